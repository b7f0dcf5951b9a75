"""How people get to see what happens: replies of `execute`, output as it arrives, progress, tables in notebooks.

    ExecuteReply       what `execute` gives for each engine
    Streamer           prints output as it arrives, a prefix before each line
    show_outputs       prints what tasks have printed and shown
    progress           a bar (tqdm) or a line that moves
    table              rows as HTML

Nothing here waits for or asks anybody: the callers bring what is to be shown. IPython and tqdm are used if present.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any, Iterable, Optional, Sequence, TextIO

ROWS_MAX = 20  # of a table in a notebook
BAR_WIDTH = 30


class ExecuteReply:
    """The outcome of `execute` on one engine; a notebook shows it like a cell's own output.

    Attributes: `source` (the code), `result` (`repr` of the last expression's value, or None), `data` (that value by
    MIME type), `execution_count` (counts the engine's), `metadata`, whose keys are attributes, too.

    Example:
        >>> reply = rc[0].execute("6 * 7", silent=False, block=True)
        >>> reply.result, reply.engine_id
        ('42', 0)
    """

    def __init__(self, source: str, value: tuple[int, dict[str, Any]], metadata: dict[str, Any]):
        self.source, self.metadata = source, metadata
        self.execution_count, self.data = value

    @property
    def result(self) -> Optional[str]:
        """`repr` of the last expression's value; None if it was None or not asked for."""
        return self.data.get("text/plain")

    def __getattr__(self, name: str) -> Any:
        if name == "metadata" or name not in self.metadata:  # the first: while it is being unpickled
            raise AttributeError(f"an ExecuteReply has no attribute {name!r}")
        return self.metadata[name]

    def __getitem__(self, key: str) -> Any:
        return self.metadata[key]

    def __repr__(self) -> str:
        text = f": {self.result}" if self.data else ""
        return f"<ExecuteReply[{self.metadata['engine_id']}]{text}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self._text() or repr(self))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/plain": self._text() or repr(self), **{k: v for k, v in self.data.items() if k != "text/plain"}}

    def _text(self) -> str:
        if not self.data:
            return ""
        text: str = self.data["text/plain"]
        return f"Out[{self.metadata['engine_id']}:{self.execution_count}]: " + ("\n" if "\n" in text else "") + text

    def display(self) -> None:
        """Show the value, if there is one: richly in a notebook, as text elsewhere."""
        if self.data:
            show(self._repr_mimebundle_())


# --- output of tasks


def show(bundle: dict[str, Any]) -> None:
    """Show a MIME bundle: richly in a notebook, as text elsewhere."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from IPython.display import display

        display(bundle, raw=True)
    else:
        print(bundle.get("text/plain", ""))


def _stream(name: str) -> TextIO:
    return sys.stderr if name == "stderr" else sys.stdout


def prefixed(name: str, engine_id: Any, text: str) -> str:
    """Text with `[stdout:3] ` before each line."""
    if not text:
        return ""
    lines = "".join(f"[{name}:{engine_id}] {line}" for line in text.splitlines(True))
    return lines if lines[-1] == "\n" else lines + "\n"


class Streamer:
    """Prints pieces of output as they arrive, from several engines and streams at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Any] = {}  # stream -> whose unfinished line stands there
        self._trouble: Optional[Exception] = None

    def __call__(self, name: str, engine_id: Any, text: str) -> None:
        """Print a piece, or show it if it comes from `display`. A stream that fails does so in `end`: the pieces come in a
        thread that serves others, too."""
        if text and self._trouble is None:
            try:
                if name == "display":
                    show(json.loads(text))
                else:
                    self._print(name, engine_id, text)
            except Exception as e:
                self._trouble = e

    def _print(self, name: str, engine_id: Any, text: str) -> None:
        with self._lock:
            before = self._open.get(name)
            lines = text.splitlines(True)
            pieces = [f"[{name}:{engine_id}] {line}" for line in lines]
            if before == engine_id and before is not None:
                pieces[0] = lines[0]
            elif before is not None:
                pieces[0] = "\n" + pieces[0]
            self._open[name] = None if text[-1] == "\n" else engine_id
            stream = _stream(name)
            stream.write("".join(pieces))
            stream.flush()

    def end(self) -> None:
        """End the lines that are still open.

        Raises:
            Exception: what the stream raised.
        """
        if self._trouble is not None:
            raise self._trouble
        with self._lock:
            for name, engine_id in self._open.items():
                if engine_id is not None:
                    _stream(name).write("\n")
            self._open.clear()


def show_outputs(tasks: Sequence[tuple[Any, str, str, Sequence[Any], Any]], groupby: str, result_only: bool, prefixes: bool) -> None:
    """Print what tasks have printed, and show the values of `execute`.

    Args:
        tasks: (engine id, stdout, stderr, what was given to `display`, value) of each.
        groupby: "type": all of stdout, then all of stderr, then all that was displayed, then all values; "engine": engine by
            engine; "order": task by task.
        result_only: show values alone.
        prefixes: tell whose each line is.

    Raises:
        ValueError: there is no such grouping.
    """
    if groupby not in ("type", "engine", "order"):
        raise ValueError(f"groupby must be 'type', 'engine' or 'order', not {groupby!r}")
    if groupby == "engine":
        tasks = sorted(tasks, key=lambda task: -1 if task[0] is None else task[0])
    kinds = (4,) if result_only else (1, 2, 3, 4)
    steps = [(task, kind) for kind in kinds for task in tasks] if groupby == "type" else [
        (task, kind) for task in tasks for kind in kinds]
    for task, kind in steps:
        if kind == 4:
            if isinstance(task[4], ExecuteReply):
                task[4].display()
        elif kind == 3:
            for bundle in task[3]:
                show(bundle)
        elif task[kind]:
            name = "stdout" if kind == 1 else "stderr"
            stream = _stream(name)
            stream.write(prefixed(name, task[0], task[kind]) if prefixes else task[kind])
            stream.flush()


# --- progress


def progress(total: int, what: str, stream: TextIO, widget: Optional[bool] = None) -> Any:
    """A function to call with the number done (and `end=True` at last) that shows it.

    Args:
        total: how much there is to do.
        what: names it.
        stream: where to write.
        widget: True: tqdm's notebook widget; False: its text; None: whichever fits. Without tqdm it is a plain line.
    """
    try:
        if widget is None:
            from tqdm.auto import tqdm
        elif widget:
            from tqdm.notebook import tqdm
        else:
            from tqdm import tqdm
    except ImportError:
        return _Line(total, what, stream)
    bar = tqdm(total=total, desc=what, file=stream)

    def show(done: int, end: bool = False) -> None:
        bar.update(done - bar.n)
        if end:
            bar.close()

    return show


class _Line:
    """A progress line: rewritten in place on a terminal, a line per tenth elsewhere."""

    def __init__(self, total: int, what: str, stream: TextIO):
        self._total, self._what, self._stream = total, what, stream
        self._started = time.monotonic()
        self._told = -1
        self._terminal = stream.isatty()

    def __call__(self, done: int, end: bool = False) -> None:
        step = done if self._terminal else done * 10 // max(self._total, 1)
        if step == self._told and not (end and self._terminal):
            return
        self._told = step
        full = BAR_WIDTH * done // max(self._total, 1)
        bar = "#" * full + "." * (BAR_WIDTH - full)
        text = f"{self._what} [{bar}] {done}/{self._total} {time.monotonic() - self._started:.1f} s"
        self._stream.write(f"\r{text}\x1b[K" + ("\n" if end else "") if self._terminal else text + "\n")
        self._stream.flush()


# --- notebooks


def escape(text: Any) -> str:
    """Text as HTML."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]], total: int) -> str:
    """HTML of a title and a table; `total` is the number of rows there would be if all were shown."""
    shown = list(rows)[:ROWS_MAX]
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in shown)
    more = f"<p>... and {total - len(shown)} more</p>" if total > len(shown) else ""
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    whole = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>" if shown else ""
    return f"<div><b>{escape(title)}</b>{whole}{more}</div>"
