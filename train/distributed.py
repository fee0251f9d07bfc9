"""Several processes that train one run together, none of which waits for another forever.

``jax.distributed`` connects them: one process per host of a TPU pod, one per GPU under SLURM, or those started by
hand. This module adds a message, and an end within a known time, for what can go wrong between them:

    a process does not start                                  after start_timeout
    one has another run, mesh or number of processes          at once, naming the field and both values
    one stops with an error                                   at once, with its reason
    one is killed, or its host or network is lost             after heartbeat_timeout; process 0: at once

Each process writes heartbeats to JAX's key-value store, which process 0 serves. Process 0 decides which are lost.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from train.config import differences
from train.private_jax import connection, process_allgather, sync_global_devices

ALIVE, STOPPED, STARTED = "train/alive/", "train/stopped/", "train/started/"
AGAIN = "restart all processes to resume from the last checkpoint"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """How this process finds the others; by default there are none."""

    distributed: bool = False
    """One of several processes with the same command line; a TPU pod's or SLURM's environment says which one."""
    coordinator: str | None = None
    """One of several processes started by hand: HOST:PORT of process 0, with any free PORT."""
    num_processes: int | None = None
    """How many processes there are; with --coordinator."""
    process_id: int | None = None
    """Number of this process, 0 ... N - 1; with --coordinator."""
    start_timeout: int = 300
    """Seconds to wait for all processes to start."""
    heartbeat_timeout: int = 60
    """Seconds without a heartbeat after which a process counts as lost and all others stop."""

    def __post_init__(self) -> None:
        by_hand = (self.coordinator, self.num_processes, self.process_id)
        if by_hand != (None, None, None) and None in by_hand:
            raise ValueError(
                "--coordinator, --num-processes and --process-id belong together, got {} and {} and {}".format(
                    *by_hand
                )
            )
        if self.coordinator is not None and ":" not in self.coordinator:
            raise ValueError(f"--coordinator must be HOST:PORT, got {self.coordinator}")
        if not 0 <= (self.process_id or 0) < (self.num_processes or 1):
            raise ValueError(
                f"--process-id must be in 0 ... --num-processes - 1, got {self.process_id} of {self.num_processes}"
            )
        if min(self.start_timeout, self.heartbeat_timeout) < 1:
            raise ValueError(
                f"timeouts must be at least 1 second, got {self.start_timeout} and {self.heartbeat_timeout}"
            )


@contextlib.contextmanager
def connected(hosts: Hosts, run: dict[str, Any]) -> Iterator[None]:
    """Inside, ``jax.devices()`` are the devices of all processes. A single process is left as it is.

    run: what all processes must agree on, as JSON.

    Raises:
      ValueError: they do not, or no environment describes the other processes.
    """
    if not hosts.distributed and hosts.coordinator is None:
        if (n_tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
            raise ValueError(
                f"srun started {n_tasks} processes, each of which would train the whole run: give --distributed"
            )
        yield
        return
    peers = _Peers(hosts)
    try:
        peers.connect()
        peers.agree(run)
        yield
        peers.leave()
    except BaseException as error:
        peers.stop(error)
        raise


def exit_code(code: int) -> int:
    """``code``, for sys.exit. A process that failed among several ends here, because JAX would wait for the others."""
    if code and jax.distributed.is_initialized():
        _end(None, code)
    return code


def check_shared(folder: Path) -> None:
    """Checks that what process 0 writes to ``folder`` is seen by all processes.

    Raises:
      ValueError: in all processes, with the numbers of those that do not see it.
    """
    if jax.process_count() == 1:
        return
    mark = folder / ".seen-by-all"
    if jax.process_index() == 0:
        mark.touch()
    sync_global_devices("marked")
    seen = process_allgather(np.int32(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if blind := np.flatnonzero(seen == 0).tolist():
        raise ValueError(
            f"{folder} must be on a disk that all processes share; processes {blind} do not see what process 0 "
            "writes there"
        )


class _Peers:
    """This process among the others. A thread watches them and ends this process when one is gone."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.interval = hosts.heartbeat_timeout / 10
        self.quiet = threading.Event()  # set: stop watching
        self.is_connected = False

    def connect(self) -> None:
        hosts = self.hosts
        by_hand = f" ({hosts.process_id} of {hosts.num_processes}, process 0 at {hosts.coordinator})"
        too_late = (
            f"process{by_hand if hosts.coordinator else ''} waited {hosts.start_timeout} s for all others; "
            "start the missing ones or correct the number of processes"
        )
        late = threading.Timer(hosts.start_timeout, _end, [too_late])
        late.daemon = True
        late.start()
        _on_abort(self._explain_abort)
        try:
            jax.distributed.initialize(
                hosts.coordinator, hosts.num_processes, hosts.process_id,
                # JAX's own limits end a process with a stack trace. They are longer, in case our thread hangs.
                initialization_timeout=2 * hosts.start_timeout,
                heartbeat_timeout_seconds=2 * hosts.heartbeat_timeout + 10,
                shutdown_timeout_seconds=hosts.heartbeat_timeout,
            )  # fmt: skip
        except ValueError as error:
            if hosts.coordinator:
                raise
            raise ValueError(
                "no TPU pod, SLURM or MPI environment was found; give --coordinator HOST:PORT, --num-processes "
                f"and --process-id ({error})"
            ) from error
        finally:
            late.cancel()
        self.client, self.address, self.id, self.count = connection()
        self.is_connected = True
        threading.Thread(target=self._watch, daemon=True).start()

    def agree(self, run: dict[str, Any]) -> None:
        """Process 0 compares its run with all others, each of the others with that of process 0."""
        ours = {"the number of processes": self.count, "the version of jax": jax.__version__, **run}
        self.client.key_value_set(f"{STARTED}{self.id}", json.dumps(ours))
        for other in range(1, self.count) if self.id == 0 else [0]:
            theirs = self.client.blocking_key_value_get(f"{STARTED}{other}", 1000 * self.hosts.start_timeout)
            if found := list(differences(ours, json.loads(theirs))):
                raise ValueError(
                    "all processes of a run must be started with the same options: "
                    + "; ".join(
                        f"{name} is {x!r} in process {self.id} and {y!r} in process {other}"
                        for name, x, y in found
                    )
                )

    def leave(self) -> None:
        """The regular end: no process leaves before all are done."""
        self.client.wait_at_barrier("train/end", 1000 * self.hosts.start_timeout)
        self.quiet.set()
        jax.distributed.shutdown()

    def stop(self, error: BaseException) -> None:
        """Tells the others why this process ends. They may be gone or stuck, so it does not wait for them at exit."""
        if not self.is_connected:
            return
        atexit.register(os._exit, 1)  # runs before the handlers that JAX registered
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Most likely a connection broke. ``_watch`` soon knows which process did it, and ends this one.
            time.sleep(self.hosts.heartbeat_timeout + 5 * self.interval)
        self.quiet.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody is left to be told
            self._announce(self.id, f"stopped: {error or type(error).__name__}")

    def _announce(self, process: int, what: str) -> None:
        self.client.key_value_set(f"{STOPPED}{process}", what, allow_overwrite=True)
        if self.id == 0:  # it serves the store that the others read
            time.sleep(3 * self.interval)

    def _watch(self) -> None:
        heard = {process: ("", time.monotonic()) for process in range(self.count)}
        beat = 0
        while not self.quiet.wait(self.interval):
            beat += 1
            try:
                self.client.key_value_set(f"{ALIVE}{self.id}", str(beat), allow_overwrite=True)
                stopped = self.client.key_value_dir_get(STOPPED)
                alive = self.client.key_value_dir_get(ALIVE) if self.id == 0 else []
            except jax.errors.JaxRuntimeError:
                if self.quiet.is_set():
                    return
                _end(self._coordinator_is_gone())
            for key, what in stopped:
                _end(f"process {_number(key)} of {self.count} {what}; {AGAIN}")
            now = time.monotonic()
            for key, said in alive:
                if heard[_number(key)][0] != said:
                    heard[_number(key)] = said, now
            for process, (_, when) in heard.items():
                if self.id == 0 and now - when > self.hosts.heartbeat_timeout:
                    what = f"sent no heartbeat for {self.hosts.heartbeat_timeout} s"
                    self._announce(process, what)
                    _end(f"process {process} of {self.count} {what}; {AGAIN}")

    def _coordinator_is_gone(self) -> str:
        return f"process 0, the coordinator at {self.address}, is gone; {AGAIN}"

    def _explain_abort(self) -> str | None:
        """Why JAX aborts this process; None if that is not known."""
        if not self.is_connected:
            return (
                "the coordinator refused this process for the reason above: do all processes have the same number of "
                "processes, and each its own id?"
            )
        host, port = self.address.rsplit(":", 1)
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            return self._coordinator_is_gone()
        return None


def _number(key: str) -> int:
    return int(key.rsplit("/", 1)[-1])


def _end(sentence: str | None, code: int = 1) -> NoReturn:
    """Ends the process from any thread, without the exit handlers that wait for other processes."""
    if sentence:
        print(f"python -m train: {sentence}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _on_abort(explain: Any) -> None:
    """Ends with the sentence of ``explain`` when JAX's runtime calls abort().

    The runtime aborts, on a thread of its own, as soon as its connection to the coordinator breaks. A Python signal
    handler would wait for the main thread, which may be waiting for the lost process; hence a handler in C.
    """

    def handler(_: int) -> None:
        if sentence := explain():
            _end(sentence)  # otherwise abort() continues when this returns

    global _handler
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


_handler: Any = None  # kept alive here: C holds no reference
