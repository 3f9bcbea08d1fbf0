import signal

import pytest

for module in ("helpers", "helpers_hosts", "helpers_processes"):  # so that their assertions, too, show the values
    pytest.register_assert_rewrite(f"{__name__}.{module}")
# The runs that tests start would ignore what nohup, or the background of a shell, has this process ignore.
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
