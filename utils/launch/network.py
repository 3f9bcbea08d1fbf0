"""Addresses, interfaces and listening sockets."""

import concurrent.futures
import contextlib
import fcntl
import os
import socket
import struct
import sys
import threading
import time
from urllib.parse import urlsplit

from ..errors import UserError


def resolve(url: str) -> tuple[str, int]:
    """IPv4 address and port of tcp://HOST:PORT. Raises UserError for anything else."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        port = parts.port
    except ValueError:
        host = port = None
    if not host or port is None or parts.scheme != "tcp":
        raise UserError(f"--dist-url {url}: must be tcp://HOST:PORT, or env:// under torchrun")
    try:
        return socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0], port
    except (OSError, UnicodeError):
        raise UserError(f"--dist-url {url}: the host {host} is not known; correct the name") from None


def listen(host: str, port: int, url: str | None) -> socket.socket:
    """A listening socket. Raises UserError if the port is taken, or the address is not one of this machine."""
    try:
        return socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise UserError(
            f"--dist-url {url}: cannot listen there ({os.strerror(error.errno)}); choose another port of this machine"
        ) from None


def interfaces() -> dict[str, str]:
    """IPv4 addresses by network interface."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                packed = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                addresses[name] = socket.inet_ntoa(packed[20:24])
    return addresses


def interface_address(name: str) -> str:
    """IPv4 address of --dist-interface. Raises UserError if it has none."""
    known = interfaces()
    if name not in known:
        raise UserError(f"--dist-interface {name}: no address; this machine has {', '.join(known)}")
    return known[name]


def check_interfaces(variable: str):
    """Raises UserError if no network interface matches the value of NCCL's or gloo's environment variable."""
    present = [name for _, name in socket.if_nameindex()]
    value = os.environ.get(variable, "")
    names = tuple(name.partition(":")[0] for name in value.lstrip("=").split(","))
    exact = value.startswith("=") or variable.startswith("GLOO")  # else NCCL takes the beginnings of names
    if not value.startswith("^") and not any(p in names if exact else p.startswith(names) for p in present):
        raise UserError(
            f"environment: {variable} is {value}, this machine has {', '.join(present)}; correct or unset it"
        )


def interface_towards(host: str) -> str | None:
    """The network interface whose address this machine uses toward host; None if that is unknown."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError, UnicodeError):
        probe.connect((host, 9))  # for a datagram socket this sends nothing, it only picks the route
        address = probe.getsockname()[0]
        return next((name for name, own in interfaces().items() if own == address), None)


def wait_for_listener(host: str, port: int, timeout: float):
    """Returns once something listens there. Raises OSError, that of the last attempt, after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())).close()
        except OSError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.2)


def call_within(timeout: float, function):
    """function(), in a thread that is abandoned after `timeout` seconds; raises its exceptions, or TimeoutError."""
    result = concurrent.futures.Future()

    def call():
        try:
            result.set_result(function())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    with contextlib.suppress(concurrent.futures.TimeoutError):
        return result.result(timeout)
    raise TimeoutError("no answer")


@contextlib.contextmanager
def hide_native_messages():
    """Keeps the C++ parts of torch.distributed from writing stack traces to stderr; their exceptions say enough."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
