"""The engine that runs a folder job on a Ray cluster: Ray Data, whose actors hold the model.

Names go out and rows come back, a kilobyte each; photos and results go between the actors and the storage, and never
through the object store. An actor that dies is started again by Ray and its photos are given out again; those that it
had finished are found finished, by the same rule as in any other resumed job.

Without an address a cluster is started on this machine, for this job, on the loopback interface alone.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count, islice
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import Any

from latentindigo.batch import BatchJob, Item, Worker
from latentindigo.batch_records import Row
from latentindigo.failures import failure_kind
from latentindigo.jobs import load_pipeline
from latentindigo.planning import Task

__all__ = ["RayEngine"]

# Arguments of `load_pipeline` that may be paths.
_PLACES = ("model", "prior", "prior_config", "guidance_vae", "latent_inn", "init_model")
_OBJECT_STORE = 100 * 2**20  # Bytes; names and rows only.
# Photos to a task: one at first, so that few photos keep all actors at work, then more, so that a million photos do not
# make a million tasks. An actor that dies repeats at most this many look-ups.
_LARGEST_TASK = 32
_TASKS_OF_A_SIZE = 64

# Everything that would make a cluster on one machine talk to more than that machine. Without the last one Ray takes the
# address of a network card; the variable is named after the systems where that is the rule.
_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_worker_register_timeout_seconds": "600",  # On a busy machine a process takes more than the usual minute.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
# Ray's dashboard process asks for the cloud's metadata even where no usage is reported. A proxy that is not there (the
# port "discard" of this machine) refuses; workers get the real settings back.
_PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
_NO_PROXY = "http://127.0.0.1:9"


class RayEngine:
    """Runs a job on Ray; a context, within which it is an engine for `run_batch`.

    Args:
        job: The job; its folders must be reachable from every node.
        workers: Actors, each with the model; None for one per accelerator, or one.
        address: An existing cluster ("auto", or host:port), or None for one on this machine that ends with the context.

    Raises:
        ValueError: Ray is not installed, or the cluster has no room for so many workers.
    """

    def __init__(self, job: BatchJob, *, workers: int | None = None, address: str | None = None) -> None:
        # In another process a relative path would mean another file.
        places = {name: job.model.get(name) for name in _PLACES}
        found = {name: place for name, place in places.items() if place not in (None, "embedded")}
        model = job.model | {name: os.path.abspath(place) for name, place in found.items() if os.path.exists(place)}
        self.job = dataclasses.replace(job, model=model)
        self.address = address
        self._workers = workers
        self._temporary: str | None = None
        self._ray: Any = None

    def __enter__(self) -> RayEngine:
        if self.address is None:
            # For the rest of this process: Ray reads them once, when it is imported.
            for name, value in {**_LOCAL, **_token()}.items():
                os.environ.setdefault(name, value)
        try:
            ray = importlib.import_module("ray")
            importlib.import_module("ray.data")
        except ImportError as error:
            raise ValueError(
                "engine: 'ray' needs Ray, which is not installed; pip install 'latentindigo[ray]', or do without"
            ) from error
        self._ray = ray
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            self._start(ray)
            self._resources = self._divide(ray.cluster_resources())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start(self, ray: Any) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address is not None:
            try:
                ray.init(address=self.address, **quiet)
            except ConnectionError as error:
                raise ValueError(f"address: no Ray cluster at '{self.address}' ({error})") from error
            return
        accelerators = _accelerators(self.job)
        # Short, for sockets in it have names of at most 107 bytes.
        self._temporary = tempfile.mkdtemp(prefix="li-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)  # noqa: S108
        mine = {name: os.environ.get(name, "") for name in _PROXIES}
        with _environment(dict.fromkeys(_PROXIES, _NO_PROXY)):
            ray.init(
                num_cpus=self._workers or max(1, accelerators),
                num_gpus=accelerators,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                runtime_env={"env_vars": mine},
                _node_ip_address="127.0.0.1",
                _temp_dir=self._temporary,
                **quiet,
            )

    def _divide(self, cluster: Mapping[str, float]) -> dict[str, float]:
        """What each actor asks for."""
        accelerators = cluster.get("GPU", 0) if _accelerators(self.job, everywhere=True) else 0
        self._workers = self._workers or max(1, int(accelerators))
        if cluster.get("CPU", 0) < self._workers:
            raise ValueError(
                f"workers: the cluster has {cluster.get('CPU', 0):g} CPUs, and {self._workers} workers need one each; "
                "ask for fewer"
            )
        # No actor lies on two accelerators, so each of these must be shared by a whole number.
        return {"num_cpus": 1, "num_gpus": 1 / ceil(self._workers / accelerators) if accelerators else 0}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ray is not None:
            self._ray.shutdown()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def __call__(self, items: Iterable[Item]) -> Iterator[tuple[Item, Row]]:
        """Restore photos.

        Args:
            items: From `list_items`; about 0.3 KB of each stay in the object store until the end.

        Yields:
            Each item with its row, in order.

        Raises:
            ModelLoadError: A worker cannot load the model.
            ValueError: The model's arguments do not fit a worker's machine.
        """
        ray = self._ray
        import pyarrow as pa

        references = [ray.put(pa.table({"item": lines})) for lines in _tasks(items)]
        if not references:
            return
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        context.execution_options.verbose_progress = False
        rows = ray.data.from_arrow_refs(references).map(
            _Actor,
            fn_constructor_args=(self.job,),
            compute=ray.data.ActorPoolStrategy(size=self._workers),
            **self._resources,
        )
        for told in rows.iter_rows():
            answer = json.loads(told["answer"])
            if "fatal" in answer:
                raise _fatal(answer)
            yield _item(answer["item"]), answer["row"]


class _Actor:
    """A worker on a cluster; what it is given and gives back is JSON text."""

    def __init__(self, job: BatchJob) -> None:
        self._worker = Worker(job, lambda: load_pipeline(**job.model))

    def __call__(self, told: dict[str, str]) -> dict[str, str]:
        item = json.loads(told["item"])
        try:
            answer = {"item": item, "row": self._worker(_item(item))}
        except Exception as error:  # What ends the job must reach whoever started it as a sentence.
            answer = {"fatal": failure_kind(error), "error": str(error) or type(error).__name__}
        return {"answer": json.dumps(answer)}


def _fatal(answer: dict[str, str]) -> Exception:
    if answer["fatal"] == "model":
        from latentindigo.pipeline import ModelLoadError  # late, for it imports diffusers

        return ModelLoadError(answer["error"])
    return MemoryError(answer["error"]) if answer["fatal"] == "memory" else ValueError(answer["error"])


def _tasks(items: Iterable[Item]) -> Iterator[list[str]]:
    coming = iter(items)
    for number in count():
        lines = [
            json.dumps(_plain(item)) for item in islice(coming, min(_LARGEST_TASK, 1 + number // _TASKS_OF_A_SIZE))
        ]
        if not lines:
            return
        yield lines


def _plain(item: Item) -> dict[str, Any]:
    task = item.task
    if task is None:
        return {"source": item.source, "error": item.error, "kind": item.kind}
    return {
        "source": item.source,
        "targets": [path.as_posix() for path in task.targets],
        "detail_maps": [path.as_posix() for path in task.detail_maps],
        "uncertainty_map": None if task.uncertainty_map is None else task.uncertainty_map.as_posix(),
    }


def _item(plain: dict[str, Any]) -> Item:
    if "targets" not in plain:
        return Item(**plain)
    uncertainty = plain["uncertainty_map"]
    task = Task(
        Path(plain["source"]),
        tuple(map(Path, plain["targets"])),
        tuple(map(Path, plain["detail_maps"])),
        None if uncertainty is None else Path(uncertainty),
    )
    return Item(plain["source"], task)


def _accelerators(job: BatchJob, *, everywhere: bool = False) -> int:
    """CUDA devices of this machine that the job may use; with `everywhere` only whether it may use any."""
    if (job.model.get("device") or "cuda").partition(":")[0] != "cuda":
        return 0
    if everywhere:
        return 1
    import torch

    return torch.cuda.device_count()


def _token() -> dict[str, str]:
    """Only this job's processes may talk to its cluster; unless the user has decided otherwise."""
    if "RAY_AUTH_MODE" in os.environ:
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
