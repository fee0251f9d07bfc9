"""Several processes that train one run together, and never wait for each other without end.

One process a host of a TPU pod, one a GPU under SLURM, or as many as were started by hand: ``jax.distributed``
connects them. What is added here is a sentence, and an end within a known time, for what goes wrong between them:

    a process does not come                                   after start_timeout
    one has another run, mesh or number of processes          at once, naming the field and both values
    one stops with an error                                   at once, with its reason
    one is killed, or its host or network is lost             after heartbeat_timeout; process 0: at once

Every process says in JAX's key-value store, which process 0 serves, that it lives; process 0 judges who is lost.
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
from jax._src import distributed as jax_distributed  # the only way to the key-value store
from jax.experimental import multihost_utils

from train.config import differences

ALIVE, STOPPED, STARTED = "train/alive/", "train/stopped/", "train/started/"
AGAIN = "start all processes again: they go on after the last checkpoint"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """How this process finds those that train with it; by default it is alone."""

    distributed: bool = False
    """One of several processes, to be started alike on every host: a TPU pod's or SLURM's environment says which."""
    coordinator: str | None = None
    """One of several processes started by hand: HOST:PORT of process 0, where PORT is any free one."""
    num_processes: int | None = None
    """How many processes there are; with --coordinator."""
    process_id: int | None = None
    """Which of them this is, 0 ... N - 1; with --coordinator."""
    start_timeout: int = 300
    """Seconds to wait until all processes are there."""
    heartbeat_timeout: int = 60
    """Seconds without a sign of life after which a process counts as lost and all others stop."""

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
    """Inside, ``jax.devices()`` are those of all processes. For a process alone, nothing happens.

    run: what all processes must have been started with, as JSON.

    Raises:
      ValueError: they were not, or no environment says who the others are.
    """
    if not hosts.distributed and hosts.coordinator is None:
        if (n_tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
            raise ValueError(
                f"srun started {n_tasks} processes, which would all do the same: give --distributed"
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
    """``code``, for sys.exit; ends a process itself if it leaves others behind, for whom JAX would wait at exit."""
    if code and jax.distributed.is_initialized():
        _end(None, code)
    return code


def check_shared(folder: Path) -> None:
    """Refuses a folder that is another one on another host: what one process writes, all must see.

    Raises:
      ValueError: with the numbers of the processes that do not see it, in all processes.
    """
    if jax.process_count() == 1:
        return
    mark = folder / ".seen-by-all"
    if jax.process_index() == 0:
        mark.touch()
    multihost_utils.sync_global_devices("marked")
    seen = multihost_utils.process_allgather(np.int32(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if blind := np.flatnonzero(seen == 0).tolist():
        raise ValueError(
            f"{folder} must lie on a disk that all processes share: what process 0 writes there, processes {blind} "
            "do not see"
        )


class _Peers:
    """This process among the others. A thread of its own watches them and ends the process when one is gone."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.interval = hosts.heartbeat_timeout / 10
        self.quiet = threading.Event()  # set: nothing is watched any more
        self.is_connected = False

    def connect(self) -> None:
        hosts = self.hosts
        by_hand = f" ({hosts.process_id} of {hosts.num_processes}, process 0 at {hosts.coordinator})"
        too_late = (
            f"process{by_hand if hosts.coordinator else ''} waited {hosts.start_timeout} s for all others; "
            "start the missing ones, or correct the number of processes"
        )
        late = threading.Timer(hosts.start_timeout, _end, [too_late])
        late.daemon = True
        late.start()
        _on_abort(self._explain_abort)
        try:
            jax.distributed.initialize(
                hosts.coordinator, hosts.num_processes, hosts.process_id,
                # JAX's own limits end a process with a stack trace: they are for the case that this one hangs.
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
        state = jax_distributed.global_state
        self.client, self.address = state.client, state.coordinator_address
        self.id, self.count = state.process_id, state.num_processes
        self.is_connected = True
        threading.Thread(target=self._watch, daemon=True).start()

    def agree(self, run: dict[str, Any]) -> None:
        """Process 0 compares everybody's run with its own, the others theirs with that of process 0."""
        ours = {"the number of processes": self.count, "the version of jax": jax.__version__, **run}
        self.client.key_value_set(f"{STARTED}{self.id}", json.dumps(ours))
        for other in range(1, self.count) if self.id == 0 else [0]:
            theirs = self.client.blocking_key_value_get(f"{STARTED}{other}", 1000 * self.hosts.start_timeout)
            if found := list(differences(ours, json.loads(theirs))):
                raise ValueError(
                    "the processes of a run must be started alike: "
                    + "; ".join(
                        f"{name} is {x!r} in process {self.id} and {y!r} in process {other}"
                        for name, x, y in found
                    )
                )

    def leave(self) -> None:
        """The end that was meant: nobody goes before all are done."""
        self.client.wait_at_barrier("train/end", 1000 * self.hosts.start_timeout)
        self.quiet.set()
        jax.distributed.shutdown()

    def stop(self, error: BaseException) -> None:
        """Lets the others know why this process ends. They are gone or stuck: it must not wait for them at exit."""
        if not self.is_connected:
            return
        atexit.register(os._exit, 1)  # before what JAX registered
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Most likely a broken connection, and who broke it will be known: ``_watch`` ends the process then.
            time.sleep(self.hosts.heartbeat_timeout + 5 * self.interval)
        self.quiet.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody left to hear it
            self._tell(self.id, f"stopped: {error or type(error).__name__}")

    def _tell(self, process: int, what: str) -> None:
        self.client.key_value_set(f"{STOPPED}{process}", what, allow_overwrite=True)
        if self.id == 0:  # it serves what the others read
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
                    what = f"was not heard of for {self.hosts.heartbeat_timeout} s"
                    self._tell(process, what)
                    _end(f"process {process} of {self.count} {what}; {AGAIN}")

    def _coordinator_is_gone(self) -> str:
        return f"process 0, the coordinator at {self.address}, is gone; {AGAIN}"

    def _explain_abort(self) -> str | None:
        """What it means that JAX aborts this process; None: nothing that is known here."""
        if not self.is_connected:
            return (
                "the coordinator refused this process, for the reason above: has every process the same number of "
                "processes, and an id of its own?"
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
    """Ends the process from whichever thread, without what waits for other processes at exit."""
    if sentence:
        print(f"python -m train: {sentence}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _on_abort(explain: Any) -> None:
    """Ends with a sentence of ``explain`` where JAX's runtime calls abort().

    It does so, on a thread of its own, as soon as its connection to the coordinator breaks. Python's handlers run
    between two instructions of the main thread, which may be waiting for the lost process: hence C's.
    """

    def handler(_: int) -> None:
        if sentence := explain():
            _end(sentence)  # else abort() goes on when this returns

    global _handler
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


_handler: Any = None  # C holds no reference
