"""ipclite: interactive parallel computing on clusters, in a package small enough to read in an afternoon.

    import ipclite as ipp

    with ipp.Cluster(n=4) as rc:
        print(rc.load_balanced_view().map_sync(pow, range(10), range(10)))

One controller, many engines, any number of clients. Names are looked up in their module on first use, because
every engine, controller and launcher imports this file.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
version_info = (0, 1, 0)

_HOME = {
    "client": ("Client",),
    "history": ("AsyncHubResult",),
    "cluster": ("Cluster", "ClusterManager"),
    "views": ("BroadcastView", "DirectView", "LoadBalancedView", "View"),
    "functions": ("Dependency", "ParallelFunction", "PrePickled", "Reference", "RemoteFunction", "current_task", "depend",
                  "dependent", "interactive", "parallel", "publish_data", "remote", "require", "use_cloudpickle", "use_dill", "use_pickle"),
    "maps": ("LazyMapIterator",),
    "results": ("ALL_COMPLETED", "AsyncMapResult", "AsyncResult", "FIRST_COMPLETED", "FIRST_EXCEPTION"),
    "display": ("ExecuteReply",),
    "executor": ("ViewExecutor",),
    "integrations": ("register_joblib_backend",),
    "errors": (
        "AlreadyDisplayedError", "AlreadyRunning", "AlreadyStopped", "CompositeError", "ConfigError", "ConnectError",
        "ConnectionFileError", "ControllerLost", "DependencyTimeout", "EngineError", "IPythonError",
        "ImpossibleDependency", "InvalidDependency", "KernelError", "LauncherError", "NoCluster",
        "NoEnginesRegistered", "NoRecord", "PackError", "ProtocolError", "RecordExpired", "RemoteError", "TaskAborted", "TaskRejectError",
        "TaskTimeout", "TimeoutError", "UnmetDependency", "UnpackError", "UserError", "collect_exceptions", "unwrap_exception",
        "wrap_exception",
    ),
}
_MODULES = ("datapub", "error")  # that scripts of IPython Parallel expect to be there without an import
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module("." + name, __name__)
    if name in _MODULE_OF:
        value = getattr(import_module("." + _MODULE_OF[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
