"""The one tree of exceptions, and the exit codes of the command line.

Everything that ipclite raises on purpose derives from `IPythonError`, the name that users of
IPython Parallel catch. Two branches matter:

    UserError     the person at the keyboard can mend it: one sentence, an exit code, no traceback
    KernelError   a task, an engine or the controller failed

A remote exception keeps its type: `remote_error` builds a class that derives from both `RemoteError`
and the class that was raised on the engine, so either `except` clause catches it.
"""

from __future__ import annotations

import sys
import types
from typing import Any, Optional

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_ALREADY_STARTED = 10
EXIT_ALREADY_STOPPED = 11
EXIT_NO_CLUSTER = 12


class IPythonError(Exception):
    """Base class of all ipclite errors."""


class UserError(IPythonError):
    """Something the user can mend. `str(e)` is one sentence that says how."""

    exit_code = EXIT_FAILURE


class ConfigError(UserError):
    """A flag, profile, path or configuration value is wrong."""

    exit_code = EXIT_USAGE


class ConnectionFileError(UserError, OSError):
    """A connection file is missing, unreadable, stale or of another program."""


class ConnectError(UserError, TimeoutError):
    """The controller could not be reached, or refused us. Names the step that failed."""


class TunnelError(ConnectError):
    """There is no ssh tunnel to the controller. `passing` tells whether it may be there at the next try."""

    def __init__(self, message: str, passing: bool = False):
        super().__init__(message)
        self.passing = passing


class AlreadyRunning(UserError):
    """A cluster with this id runs already in this profile."""

    exit_code = EXIT_ALREADY_STARTED


class AlreadyStopped(UserError):
    """The cluster that should be stopped is not running."""

    exit_code = EXIT_ALREADY_STOPPED


class NoCluster(UserError, FileNotFoundError):
    """There is no cluster with this id."""

    exit_code = EXIT_NO_CLUSTER


class LauncherError(UserError):
    """A controller or engines could not be started, or ended before they were ready."""


class NotRunning(LauncherError):
    """What a launcher's state describes is not running any more."""


class ProtocolError(IPythonError):
    """A message that does not follow the wire format."""


class KernelError(IPythonError):
    """A task, an engine or the controller failed."""


class ControllerLost(KernelError):
    """The controller is gone, so the result can not arrive any more."""


class EngineError(KernelError):
    """The engine that ran the task is gone; the message names the cause."""


class NoEnginesRegistered(KernelError):
    """There is no engine to run the task."""


class PackError(KernelError):
    """An object can not be pickled."""


class UnpackError(KernelError):
    """A received object can not be unpickled."""


class TaskAborted(KernelError):
    """The task was taken back before it started."""


class TaskTimeout(KernelError):
    """The task waited longer than its `timeout`."""


class TaskRejectError(KernelError):
    """An engine refused the task."""


class UnmetDependency(KernelError):
    """A dependency does not hold on this engine; another one may be tried."""


class ImpossibleDependency(UnmetDependency):
    """A dependency can not be met any more."""


class DependencyTimeout(ImpossibleDependency):
    """A dependency was not met in time."""


class InvalidDependency(ImpossibleDependency):
    """A dependency names something that does not exist."""


class NoRecord(KernelError, KeyError):
    """The controller's database has nothing about the task."""

    __str__ = Exception.__str__  # KeyError would show the sentence in quotes


class RecordExpired(NoRecord):
    """The database had a record of the task, and dropped it: to stay within a limit, or because it was purged."""


# IPython Parallel's `TimeoutError` is the built-in class, so `except ipp.TimeoutError` works.
TimeoutError = TimeoutError


class RemoteTraceback(Exception):
    """Carries the engine's traceback as the `__cause__` of a remote error, the way that
    `concurrent.futures` shows the traceback of another process."""

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return "\n" + self.text


class RemoteError(KernelError):
    """An exception raised on an engine.

    Attributes: `ename` and `evalue` (class name and message), `traceback` (the engine's, as text),
    `engine_info` (dict with `engine_id`, `engine_uuid`, `host`, `pid`).
    """

    ename: str = ""
    evalue: str = ""
    traceback: str = ""
    engine_info: dict[str, Any]

    def __init__(self, ename: str = "", evalue: str = "", traceback: str = "",
                 engine_info: Optional[dict[str, Any]] = None):
        super().__init__(ename, evalue)
        self._tell(ename, evalue, traceback, engine_info or {})

    def _tell(self, ename: str, evalue: str, traceback: str, engine_info: dict[str, Any]) -> None:
        self.ename, self.evalue = ename, evalue
        self.traceback, self.engine_info = traceback, engine_info
        self.__cause__ = RemoteTraceback(self._where() + "\n" + traceback) if traceback else None

    def _where(self) -> str:
        info = self.engine_info
        if info.get("engine_id") is None:
            return "[controller]"
        return f"[engine {info['engine_id']} on {info.get('host', '?')}, pid {info.get('pid', '?')}]"

    def __str__(self) -> str:
        return f"{self.ename}: {self.evalue}" if self.evalue else self.ename

    def render_traceback(self) -> list[str]:
        """The engine's traceback as a list of lines."""
        return [self._where(), *self.traceback.splitlines()]

    # IPython shows an exception that has this method by what it returns.
    _render_traceback_ = render_traceback

    def print_traceback(self, excid: Optional[int] = None) -> None:
        """Print the engine's traceback to stderr."""
        print("\n".join(self.render_traceback()), file=sys.stderr)


class CompositeError(RemoteError):
    """Several tasks failed. `elist` holds their exceptions; `str(e)` shows the first few.

    Args:
        message: what failed, in a few words.
        elist: the exceptions, one per failed task.
    """

    tb_limit = 4

    def __init__(self, message: str, elist: list[BaseException]):
        super().__init__("CompositeError", message)
        self.args = (message, elist)
        self.msg, self.elist = message, list(elist)

    def _line(self, e: BaseException) -> str:
        where = e._where() + " " if isinstance(e, RemoteError) else ""
        name = e.ename if isinstance(e, RemoteError) else type(e).__name__
        text = e.evalue if isinstance(e, RemoteError) else str(e)
        first = (text.splitlines() or [""])[0]
        return f"{where}{name}: {first[:200]}"

    def __str__(self) -> str:
        lines = [self.msg] + ["  " + self._line(e) for e in self.elist[: self.tb_limit]]
        if len(self.elist) > self.tb_limit:
            lines.append(f"  ... and {len(self.elist) - self.tb_limit} more")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"CompositeError({len(self.elist)})"

    def render_traceback(self, excid: Optional[int] = None) -> list[str]:
        """Traceback of exception number `excid`, or of the first `tb_limit`."""
        chosen = self.elist[: self.tb_limit] if excid is None else [self._pick(excid)]
        lines: list[str] = []
        for e in chosen:
            lines += e.render_traceback() if isinstance(e, RemoteError) else [self._line(e)]
            lines.append("")
        if excid is None and len(self.elist) > self.tb_limit:
            lines.append(f"... {len(self.elist) - self.tb_limit} more exceptions")
        return lines

    _render_traceback_ = render_traceback

    def print_traceback(self, excid: Optional[int] = None) -> None:
        """Print the traceback of exception number `excid`, or of the first `tb_limit`, to stderr."""
        print("\n".join(self.render_traceback(excid)), file=sys.stderr)

    def _pick(self, excid: int) -> BaseException:
        try:
            return self.elist[excid]
        except IndexError:
            raise IndexError(f"there is no exception {excid}: this CompositeError holds {len(self.elist)}") from None

    def raise_exception(self, excid: int = 0) -> None:
        """Raise exception number `excid`.

        Raises:
            IndexError: there is no such exception.
        """
        raise self._pick(excid)


class AlreadyDisplayedError(RemoteError):
    """A remote error whose traceback has been shown already."""


def collect_exceptions(results: Any, method: str = "the calls") -> Any:
    """Results as they are, a list of them or a dict, unless exceptions are among them.

    Args:
        method: names what was called, for the message.

    Raises:
        CompositeError: with the exceptions.
    """
    values = results.values() if isinstance(results, dict) else results
    elist = [value for value in values if isinstance(value, BaseException)]
    if elist:
        raise CompositeError(f"{len(elist)} exceptions in {method}", elist)
    return results


def wrap_exception(engine_info: Optional[dict[str, Any]] = None) -> dict[str, Any]:
    """The exception that is being handled, as a dict of texts that can be sent as JSON."""
    import traceback

    kind, error, trace = sys.exc_info()
    if kind is None:
        raise RuntimeError("no exception is being handled")
    return {"status": "error", "ename": kind.__name__, "evalue": str(error), "engine_info": dict(engine_info or {}),
            "traceback": "".join(traceback.format_exception(kind, error, trace))}


def unwrap_exception(content: dict[str, Any]) -> RemoteError:
    """A `RemoteError` of what `wrap_exception` has told."""
    return RemoteError(content["ename"], content["evalue"], content.get("traceback", ""), content.get("engine_info"))


def remote_error(info: dict[str, Any], original: Optional[BaseException] = None) -> KernelError:
    """Build the exception that the client raises for a failed task.

    Args:
        info: what travelled: `ename`, `evalue`, `traceback`, `engine_id`, `engine_uuid`, `host`, `pid`.
            An `ename` that is one of this module's own classes with `"own": true` gives that class.
        original: the exception object raised on the engine, if it could be unpickled.

    Returns:
        An instance of `RemoteError` and, where possible, of the original class too. Exceptions that are not
        `Exception`s (SystemExit, KeyboardInterrupt) must not end the client: they come back as `RemoteError` only.
    """
    ename, evalue, traceback = info.get("ename", "?"), info.get("evalue", ""), info.get("traceback", "")
    where = {k: info.get(k) for k in ("engine_id", "engine_uuid", "host", "pid")}
    if info.get("own"):
        own = globals().get(ename)
        if isinstance(own, type) and issubclass(own, KernelError) and not issubclass(own, RemoteError):
            error = own(evalue)
            error.engine_info = where  # type: ignore[attr-defined]
            return error
    if isinstance(original, Exception) and not isinstance(original, IPythonError):
        try:
            return _keep_type(original, ename, evalue, traceback, where)
        except Exception as e:  # a class with a hostile layout or metaclass still has its strings
            evalue = f"{evalue} (its class could not be kept: {type(e).__name__}: {e})"
    return RemoteError(ename, evalue, traceback, where)


_both: dict[type, type] = {}
_BOTH_MAX = 1000  # classes made in notebooks come and go


def _copy_fields(original: Exception, error: Exception) -> None:
    """Copy what is kept outside of `__dict__` and `args`: the file of an OSError, the name of an ImportError, ..."""
    for kind in type(original).__mro__:
        if kind in (BaseException, object):
            continue
        for name, field in vars(kind).items():
            if isinstance(field, (types.MemberDescriptorType, types.GetSetDescriptorType)) and name[:2] != "__":
                try:
                    value = getattr(original, name)
                    if value is not None:  # an OSError shows a file name that was set, even if None
                        setattr(error, name, value)
                except (AttributeError, TypeError):  # unset or read-only
                    pass


def _keep_type(original: Exception, ename: str, evalue: str, traceback: str, where: dict[str, Any]) -> RemoteError:
    kind = type(original)
    both = _both.get(kind)
    if both is None:
        # The original's __str__, __reduce__ and the like must win, so that the message reads as it did there.
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__str__": kind.__str__,
                 "__doc__": kind.__doc__, "__reduce__": lambda self: (remote_error, (self._info(), None))}
        names["_info"] = lambda self: {"ename": self.ename, "evalue": self.evalue,
                                       "traceback": self.traceback, **self.engine_info}
        if len(_both) >= _BOTH_MAX:
            _both.clear()
        both = _both[kind] = type(kind.__name__, (RemoteError, kind), names)
    try:
        error: RemoteError = both.__new__(both, *original.args)
    except TypeError:  # MemoryError only makes its own kind
        error = Exception.__new__(both, *original.args)
    if kind.__init__ in (c.__dict__.get("__init__") for c in kind.__mro__ if c.__module__ == "builtins"):
        kind.__init__(error, *original.args)  # fills the C fields of UnicodeError, SyntaxError, OSError, ...
    error.args = original.args
    _copy_fields(original, error)
    error.__dict__.update(original.__dict__)
    error._tell(ename, evalue, traceback, where)
    return error
