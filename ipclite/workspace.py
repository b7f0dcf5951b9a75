"""What user code sees of an engine: its namespace, its functions, and the operations on them.

    Engine ── job(spec), job.op(job, payload) ──► Workspace ──► packed value

Each `_op_` unpacks its payload, does what its name says and returns the packed value; what it raises becomes the task's
error. To add an operation: a method here, and a row in `_ops`.
"""

from __future__ import annotations

import ast
import binascii
import builtins
import itertools
import json
import linecache
import os
import sys
import traceback
import types
from typing import Any, Callable, Iterator, Optional

from . import pack
from .errors import EngineError, ProtocolError, UnmetDependency

REPRS = (("text/html", "_repr_html_"), ("text/markdown", "_repr_markdown_"), ("text/latex", "_repr_latex_"),
         ("image/svg+xml", "_repr_svg_"), ("image/png", "_repr_png_"), ("image/jpeg", "_repr_jpeg_"))


class Job:
    """A spec, ready to run: what to do with a payload. Shared by the tasks that came with it."""

    __slots__ = ("op", "session", "fn", "body", "run_timeout")

    def __init__(self, op: Callable[..., Any], session: bytes, fn: Optional[str], body: dict[str, Any]):
        self.op, self.session, self.fn, self.body = op, session, fn, body
        self.run_timeout: Optional[float] = body.get("run_timeout")


class Workspace:
    """The namespace of an engine and what can be done there.

    Args:
        where: tells who we are, for errors.
        startup: code to run before the first task, and after each `clear`: (source, name) pairs.
        log: where to tell that it failed.
        mark: is told at which item of a chunk we are, counted from 1 (0: at none), when it matters.

    Attributes:
        again: the task that runs has been tried before.
    """

    def __init__(self, where: Callable[[], dict[str, Any]], startup: list[tuple[str, str]], log: Any, mark: Callable[[int], Any]):
        self._where, self._startup, self._log, self._mark = where, startup, log, mark
        self.again = False
        self.main = types.ModuleType("__main__")
        self.namespace: dict[str, Any] = self.main.__dict__
        self.functions: dict[tuple[bytes, str], Any] = {}  # (session, digest) -> frames, or what they became
        self._executed = 0  # pieces of code, for the numbers that notebooks show
        self._kept: dict[str, Any] = {}  # names that are there again after each `clear`
        self._ops: dict[str, Callable[..., Any]] = {
            "apply": self._op_apply, "map": self._op_map, "execute": self._op_execute, "push": self._op_push,
            "pull": self._op_pull, "clear": self._op_clear,
        }
        self._reset()

    def _reset(self) -> None:
        self.namespace.clear()
        self.namespace.update({"__name__": "__main__", "__doc__": None, "__builtins__": builtins, "__spec__": None, **self._kept})

    def keep(self) -> None:
        """What is in the namespace now is to be there again after each `clear`."""
        self._kept = dict(self.namespace)

    def run_startup(self) -> None:
        """Run the startup code; what fails is logged, and the rest runs."""
        for source, name in self._startup:
            try:
                exec(compile(source, name, "exec"), self.namespace)
            except Exception:
                self._log.error("startup code %s failed:\n%s", name, traceback.format_exc())

    def job(self, session: bytes, raw: bytes) -> Job:
        """What a spec asks for; its client's folders become importable."""
        body = json.loads(raw)
        for folder in body.get("path", ()):
            if folder not in sys.path and os.path.isdir(folder):
                sys.path.append(folder)
        return Job(self._ops.get(body.get("op"), self._op_unknown), session, body.get("fn"), body)

    def _function(self, job: Job) -> tuple[Any, dict[str, Any], Optional[dict[str, Any]]]:
        """The function of a job, the names captured with it, and what to lend to the namespace while it runs."""
        key = (job.session, job.fn or "")
        held = self.functions.get(key)
        if held is None:
            raise ProtocolError(f"the function {job.fn} never arrived")
        if type(held) is list:
            names: dict[str, Any] = {}
            payload = held if len(held) > 1 else bytes(held[0])
            held = (pack.unpack(payload, self.namespace, names), names, pack.merged(names) if names else None)
            if not pack.is_live(payload):
                self.functions[key] = held
        return held  # type: ignore[no-any-return]

    def _arguments(self, payload: Any, names: dict[str, Any], extended: Any) -> tuple[Any, Any]:
        """Unpacked arguments, and what to lend while they are used: functions among them may bring names of their own."""
        more: dict[str, Any] = {}
        value = pack.unpack(payload, self.namespace, more)
        return value, pack.merged({**names, **more}) if more else extended

    def _op_apply(self, job: Job, payload: Any) -> Any:
        function, names, extended = self._function(job)
        (args, kwargs), extended = self._arguments(payload, names, extended)
        if extended is None:
            return pack.pack(function(*args, **kwargs))
        with pack.lend(self.namespace, extended):
            return pack.pack(function(*args, **kwargs))

    def _op_map(self, job: Job, payload: Any) -> Any:
        """The value is (values, failures): failures maps the position of an item to its packed error."""
        function, names, extended = self._function(job)
        sequences, extended = self._arguments(payload, names, extended)
        skip = {int(k): why for k, why in job.body["skip"].items()} if "skip" in job.body else {}
        calls = self._marked(function, sequences, skip) if self.again else map(function, *sequences)
        with pack.lend(self.namespace, extended):
            try:
                values, failures = self._run_items(calls, len(sequences[0]), bool(job.body.get("retries")))
            finally:
                if self.again:
                    self._mark(0)
            for k, why in skip.items():
                failures[k] = bytes(pack.pack_error(EngineError(why), self._where()))
            return pack.pack((values, failures))

    def _run_items(self, calls: Iterator[Any], n: int, once: bool) -> tuple[list[Any], dict[int, Any]]:
        values: list[Any] = []
        failures: dict[int, Any] = {}
        if once:  # what raises is tried again on another engine
            values.extend(calls)
        while True:
            try:
                values.extend(calls)  # what came before an exception stays in the list
                if len(values) >= n:
                    return values, failures
                raise RuntimeError("the function raised StopIteration")  # as PEP 479 has it for generators
            except UnmetDependency:  # the whole chunk goes elsewhere
                raise
            except Exception as e:
                failures[len(values)] = bytes(pack.pack_error(e, self._where()))
                values.append(None)

    def _marked(self, function: Callable[..., Any], sequences: Any, skip: dict[int, str]) -> Iterator[Any]:
        """Like `map`, so that it is known which item ends the engine; and those that have done so are left out."""
        def call(k: int, *args: Any) -> Any:
            self._mark(k + 1)
            return None if k in skip else function(*args)

        return map(call, itertools.count(), *sequences)

    def _op_execute(self, job: Job, payload: Any) -> Any:
        source, name, show = pack.unpack(payload)
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        tree = ast.parse(source, name)
        last = tree.body.pop() if show and tree.body and isinstance(tree.body[-1], ast.Expr) else None
        self._executed += 1
        exec(compile(tree, name, "exec"), self.namespace)
        value = None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), self.namespace)
        if value is not None:
            self.namespace["_"] = value
        return pack.pack((self._executed, {} if value is None else mime_bundle(value)))

    def _op_push(self, job: Job, payload: Any) -> Any:
        names: dict[str, Any] = {}
        for name, value in pack.unpack(payload, self.namespace, names).items():
            if name.isidentifier():
                self.namespace[name] = value
            else:  # an attribute or an item of what is there
                exec(compile(f"{name} = _value_", "<push>", "exec"), self.namespace, {"_value_": value})
        for name, value in names.items():  # functions that were pushed stay, and so must what they refer to
            self.namespace.setdefault(name, value)
        return pack.pack(None)

    def _op_pull(self, job: Job, payload: Any) -> Any:
        wanted = pack.unpack(payload)
        values = [eval(compile(w, "<pull>", "eval"), self.namespace) for w in ([wanted] if isinstance(wanted, str) else wanted)]
        return pack.pack(values[0] if isinstance(wanted, str) else values)

    def _op_clear(self, job: Job, payload: Any) -> Any:
        self._reset()
        self.run_startup()
        return pack.pack(None)

    def _op_unknown(self, job: Job, payload: Any) -> Any:
        raise ProtocolError(f"this engine does not know the operation {job.body.get('op')!r}; is its ipclite older than the client's?")


def mime_bundle(value: Any) -> dict[str, Any]:
    """What a notebook shows of a value, by MIME type."""
    bundle: dict[str, Any] = {"text/plain": repr(value)}
    for mime, name in REPRS if not isinstance(value, type) else ():
        try:
            shown = getattr(value, name, lambda: None)()
        except Exception:  # as in a notebook: it is told, and the other forms are shown
            traceback.print_exc()
            continue
        if isinstance(shown, (str, bytes)):
            bundle[mime] = binascii.b2a_base64(shown, newline=False).decode() if isinstance(shown, bytes) else shown
    return bundle
