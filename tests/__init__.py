import pytest

for module in ("helpers", "helpers_hosts", "helpers_processes"):  # so that their assertions, too, show the values
    pytest.register_assert_rewrite(f"{__name__}.{module}")
