"""`ipclite logger`: shows the log lines of processes on all hosts, as they are written.

    controller, agents, engines, ipcluster ── Forwarder (`--log-url`) ══ CURVE ══► Listener ──► stdout

Rules that hold here:
- a logger that is away, slow or gone holds nobody up: lines wait for it, `LINES_KEPT` of them, and then get lost;
- lines are encrypted: the address that the logger prints ends in its public key. Whoever has the address can send lines,
  so they are shown without what would play tricks on a terminal.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
from collections import deque
from pathlib import Path
from typing import Any, List, Optional

from . import config, net
from .errors import ConfigError, ConnectionFileError

LINES_KEPT = 1000
LINE_MAX = 1 << 20  # bytes
LINGER_MS = 500
LOOK_MS = 200
FIELDS = 3  # of a message: topic, origin, text
ADDRESS = re.compile(r"tcp://([^/\s]+):(\d{1,5})(?:/([0-9a-f]{64}))?")


def key_file(profile_dir: config.PathLike) -> Path:
    """Where the logger of a profile keeps its keys, so that its address stays the same."""
    return Path(profile_dir, "security", "iplogger.json")


# ---------------------------------------------------------------- the senders' end


class Forwarder(logging.Handler):
    """Sends what is logged to a logger.

    Args:
        address: "tcp://host:port". key: the logger's public key.
        role: how the process calls itself.
    """

    def __init__(self, address: str, key: str, role: str):
        super().__init__()
        self._address, self._key, self._role = address, key, role
        self._origin = f"{socket.gethostname()}:{os.getpid()}"
        self._waiting: "deque[List[bytes]]" = deque(maxlen=LINES_KEPT)
        self._context: Any = None
        self._sock: Any = None
        self._pid = os.getpid()

    def open(self) -> None:
        """Connect. What forks processes does so afterwards."""
        self._context = net.Context()
        self._sock = net.line_sender(self._context, self._address, self._key, LINES_KEPT, LINGER_MS)
        while self._waiting:
            net.send(self._sock, self._waiting.popleft())

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line, or keep it until there is a connection."""
        topic = f"{self._role}.{record.levelname}"
        line = [word.encode(errors="replace") for word in (topic, self._origin, self.format(record))]
        if self._sock is None:
            self._waiting.append(line)
        elif self._pid == os.getpid():
            net.send(self._sock, line)

    def close(self) -> None:
        """Let what is on its way leave, for a moment."""
        super().close()
        if self._sock is not None and self._pid == os.getpid():
            self._sock.close()
            self._context.term()
        self._sock = None


def forward(settings: config.Settings, role: str, at_once: bool = True) -> None:
    """Have this process's log lines go where `--log-url` says, too; to be called after `setup_logging`.

    Args:
        at_once: False: lines wait for `open_all`, since this process forks others first.

    Raises:
        ConfigError: it is no address.
    """
    url = settings["Application.log_url"]
    match = ADDRESS.fullmatch(url)
    if not match:
        raise ConfigError(f"--log-url needs an address like tcp://10.0.1.5:20202, as `{config.PROGRAM} logger` prints it, "
                          f"not {url!r}.")
    key = match[3]
    if not key:
        try:
            key = str(config.read_json(key_file(settings.profile_dir))["public_key"])
        except (ConnectionFileError, KeyError):
            config.log(role).warning("--log-url=%s has no effect: give the whole address that `%s logger` prints.", url,
                                     config.PROGRAM)
            return
    handler = Forwarder(f"tcp://{match[1]}:{match[2]}", key, role)
    package = config.log()
    handler.setFormatter(package.handlers[0].formatter)
    package.addHandler(handler)
    if at_once:
        handler.open()


def open_all() -> None:
    """Connect what waits."""
    for handler in config.log().handlers:
        if isinstance(handler, Forwarder):
            handler.open()


# ---------------------------------------------------------------- the logger


class Listener:
    """Takes lines and prints them.

    Args:
        url: where to listen, "tcp://address:port"; port 0: any.
        topics: beginnings of "program.LEVEL"; other lines are not shown. None: all are.
    """

    def __init__(self, url: str, topics: List[str], profile_dir: Path):
        match = ADDRESS.fullmatch(url)
        if not match or match[3]:
            raise ConfigError(f"--url needs an address to listen on, like tcp://*:20202, not {url!r}.")
        self._topics = tuple(topics) or ("",)
        self._context = net.Context()
        try:
            keys = _keys(profile_dir)
            self._sock, port = net.line_listener(self._context, match[1], int(match[2]), keys, LINE_MAX)
        except BaseException:
            self._context.term()
            raise
        self.address = f"tcp://{net.public_host(match[1], '')}:{port}/{net.key_in_hex(keys.public)}"

    def run(self) -> None:
        """Print lines until a signal comes."""
        while True:
            if not self._sock.poll(LOOK_MS):  # a signal that comes just before a wait does not end it
                continue
            frames = self._sock.recv_multipart()
            if len(frames) == FIELDS:
                topic, origin, text = (_tame(frame.decode(errors="replace")) for frame in frames)
                if topic.startswith(self._topics):
                    print(f"{origin} {text}", flush=True)

    def close(self) -> None:
        """Listen no more."""
        self._sock.close(0)
        self._context.term()


def _tame(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _keys(profile_dir: Path) -> net.KeyPair:
    path = key_file(profile_dir)
    try:
        found = config.read_json(path)
        return net.KeyPair(net.key_of_hex(found["public_key"]), str(found["secret_key"]))
    except (ConnectionFileError, KeyError, ValueError):
        pair = net.make_keys()
        config.make_profile_dir(profile_dir)
        config.write_json(path, {"public_key": net.key_in_hex(pair.public), "secret_key": pair.secret})
        return pair


def _listen(argv: List[str]) -> int:
    settings = config.parse("logger", argv)
    config.setup_logging("iplogger", settings["Application.log_level"])
    topics = [topic for topic in settings["LogWatcher.topics"].split(",") if topic]
    listener = Listener(settings["LogWatcher.url"], topics, settings.profile_dir)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        print(f"Give this to whose log you want to see:  --log-url={listener.address}", file=sys.stderr, flush=True)
        listener.run()
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """`ipclite logger`: the command line."""
    return config.run_main(config.PROGRAM, _listen, argv)


if __name__ == "__main__":
    sys.exit(main())
