"""The parent process: starts workers, replaces them, and stops them. It does nothing else.

It sleeps in one select; what wakes it is a signal, a word or the end of a worker, or a time that has come.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterable
from math import inf
from typing import TYPE_CHECKING, Any

from leanserve.errors import SettingsError
from leanserve.settings import ReloadSettings, Settings, uses_tls
from leanserve.supervisor.budget import StartBudget
from leanserve.supervisor.child import Child, ChildMove, ChildState, reap_strangers
from leanserve.supervisor.control import Control
from leanserve.supervisor.crew import Crew
from leanserve.supervisor.deaths import Deaths
from leanserve.supervisor.hang import Hangs
from leanserve.supervisor.hooks import Hooks
from leanserve.supervisor.inherit import Inheritance
from leanserve.supervisor.notify import Notifier
from leanserve.supervisor.orders import Orders
from leanserve.supervisor.pool import count_workers
from leanserve.supervisor.reconfigure import reconfigure
from leanserve.supervisor.roll import Roll
from leanserve.supervisor.signals import SignalQueue
from leanserve.supervisor.size import Size
from leanserve.supervisor.states import SupervisorMachine, SupervisorMove, SupervisorState
from leanserve.supervisor.steering import Steering
from leanserve.supervisor.template import Preload
from leanserve.supervisor.upgrade import Upgrade, UpgradeState

if TYPE_CHECKING:
    from leanserve.supervisor.reload import Watcher

__all__ = ["Supervisor"]

logger = logging.getLogger("leanserve")

_EXIT_BOOT, _EXIT_GAVE_UP = 3, 4

# SIGTERM has its default effect in a worker that boots; one that is stuck in C code gets this much time.
_BOOT_GRACE_S = 1.0
# What a worker takes from the end of its drain to its exit, besides kill_grace: cancelling, then cutting.
_CUT_S = 2.0
_HURRY_S = 3.0
# From a fork that the kernel refused, or that has to wait, to the next try.
_START_AGAIN_S = 1.0


class Supervisor:
    """Serves an application with worker processes.

    Args:
        app: ``module:attribute``, or the application itself when workers are forked.
        settings: all settings.
        entry: dotted name of what a worker process runs; resolved there, never here.
        reread: reads the settings again and checks them.

    Raises:
        SettingsError: an address or the number of workers cannot be used.
        OSError: an address cannot be bound.
    """

    def __init__(
        self, app: Any, settings: Settings, *, entry: str = "leanserve.worker.process:main",
        reread: Callable[[], Settings] | None = None,
    ) -> None:  # fmt: skip
        self.settings = settings
        self._reread = reread
        self.machine = SupervisorMachine()
        self.hooks = Hooks(settings.pool.hooks, settings.load.app_dir)
        self.slots, self._slots_why = count_workers(settings.pool)
        self.inheritance = Inheritance(self, os.environ)
        self.listeners = self.inheritance.open_listeners(settings.listen, self.slots)
        self._signals = SignalQueue()
        self.has_threads = settings.pool.worker_kind == "thread"
        loops = self.slots if self.has_threads else 1
        self.crew = Crew(app, settings, self.listeners, self._signals, entry, loops)
        try:
            self._orders = Orders(self)
            self.control = Control(
                settings, self.crew, self.listeners.release, self._orders.obey,
                exported=self.inheritance.control,
            )  # fmt: skip
        except (SettingsError, OSError):
            self.listeners.close()
            raise
        self.deaths = Deaths(self)
        self.size = Size(self)
        self.upgrade = Upgrade(self)
        self.notifier = Notifier(os.environ)
        backlog, groups = settings.listen.backlog, self.inheritance.groups
        self.steering = Steering(self.listeners, self.crew, backlog, groups)
        self._preload = Preload(
            app, settings, self.crew, self.listeners.release, entry,
            start=self.start, roll=self.roll_workers, fail=self.deaths.cannot_start,
            note_death=self.control.note_death,
        )  # fmt: skip
        self._hangs = Hangs(self.crew)
        self.selector = selectors.DefaultSelector()
        self.start_at: dict[int, float] = {}
        self.roll = Roll(settings.roll, self.crew, self.machine, self.start, self.last_moment)
        self._budget = StartBudget(settings.roll, self.crew)
        self.watcher = _watch(settings.reload) if settings.reload.reload else None
        self._orphans: set[int] = set()

    def __repr__(self) -> str:
        return f"<Supervisor {self.machine.state.name} {len(self.crew.children)} workers>"

    def run(self, *, then_exit: bool = False) -> int:
        """Serve until told to stop. Main thread only.

        Args:
            then_exit: the process ends behind it, so signals are not given back to former handlers.

        Returns:
            0, 3 when no worker could start, 4 when workers crash faster than the restart budget allows.
        """
        self._signals.open()
        try:
            self.selector.register(self._signals, selectors.EVENT_READ)
            if self.watcher is not None:
                self.watcher.open()
                self.selector.register(self.watcher, selectors.EVENT_READ)
            logger.info("starting %d worker%s, supervisor pid %d", *self._counted())
            if self._slots_why:
                logger.info("%s", self._slots_why)
            self.crew.scoreboard.tell_server(pid=os.getpid(), born_ns=time.monotonic_ns(), slots=self.slots)
            self.hooks.call("supervisor_started")
            self.inheritance.begin()
            self._preload.open(self.selector)
            for slot in self._heads():
                self.start(slot)
            while self.machine.state is not SupervisorState.STOPPED:
                self._wait()
        finally:
            self._close(then_exit=then_exit)
        return self.deaths.exit_code

    def _counted(self) -> tuple[int, str, int]:
        return self.slots, "" if self.slots == 1 else "s", os.getpid()

    def _announce(self) -> None:
        """The addresses, once they are true: nothing listens before the first worker is ready."""
        for url in self.listeners.describe(tls=uses_tls(self.settings.tls)):
            logger.info("listening on %s", url)

    def _close(self, *, then_exit: bool) -> None:
        self.control.close()
        for child in list(self.crew.children.values()):
            child.kill()  # only an error of ours leads here with children left
            os.waitpid(child.pid, 0)
            child.channel.close()
        self._preload.close()
        if self.watcher is not None:
            self.watcher.close()
        self.selector.close()
        self._signals.close(ignore=then_exit)
        self.crew.close()
        self.listeners.close()

    # The loop

    def _wait(self) -> None:
        """One turn: sleep, then deal with what has come."""
        self._publish()
        self.aim()
        now = time.monotonic()
        times = [self.control.start_at_s, self._preload.start_at_s, self.upgrade.wake_at_s]
        times += [self._budget.next_s, self._hangs.look_at_s, self.notifier.next_s]
        times += [child.kill_at_s for child in self.crew.children.values()]
        next_time = min([*times, *self.start_at.values()])
        timeout = None if next_time == inf else max(next_time - now, 0)
        ready = self.selector.select(timeout)
        for number in self._signals.take():
            self._handle(number)
        # The dead before the living: the word of one that is gone by now must not send its predecessor away.
        self._reap()
        for key, _ in ready:
            if isinstance(key.data, Child) and self._lives(key.data):
                self._hear(key.data)
            elif key.data is self.control:
                self.control.handle(key.fileobj)
            elif key.data is self._preload:
                self._preload.handle(key.fileobj)
            elif key.data is self.upgrade:
                self.upgrade.hear()
            elif key.data is self.inheritance:
                self.inheritance.hear()
            elif key.fileobj is self.watcher and self.watcher is not None:
                self._look_at_files(self.watcher)
        self._keep_times()

    def aim(self) -> None:
        """Have the kernel choose among our slots, while we are the server."""
        serves = self.inheritance.owner and self.upgrade.machine.state is not UpgradeState.LEFT
        if serves and self.machine.state is not SupervisorState.STOPPING:
            self.steering.aim(self.slots)

    def _publish(self) -> None:
        """Say on the scoreboard what we know ourselves."""
        state = self.machine.state
        self.crew.scoreboard.tell_server(
            slots=self.slots, crashes=self.deaths.restarts.total, restarts=self.crew.restarts,
            stopping=state >= SupervisorState.STOPPING, rolling=state is SupervisorState.ROLLING,
        )  # fmt: skip
        ready = [child for child in self.crew.children.values() if child.state is ChildState.READY]
        self.notifier.look(state, len(ready), self.slots, time.monotonic())

    def _look_at_files(self, watcher: Watcher) -> None:
        try:
            self._reload(watcher.take())
        except EOFError:
            logger.error("the process that watches for changes has died; start again to reload on changes")
            self.selector.unregister(watcher)
            watcher.close()
            self.watcher = None

    def _handle(self, number: signal.Signals) -> None:
        name = _HANDLERS.get(number.name)
        if name is not None:
            logger.debug("got %s", number.name)
            name(self)

    def _keep_times(self) -> None:
        now = time.monotonic()
        for child in list(self.crew.children.values()):
            if child.kill_at_s <= now:
                logger.warning("worker %s did not leave in time: SIGKILL", child)
                child.kill(with_family=self.watcher is not None)
        for slot in [slot for slot, when in self.start_at.items() if when <= now]:
            del self.start_at[slot]
            self.start(slot)
        self._budget.keep_time(now)
        self.control.keep_time(now)
        self._hangs.keep_time(now, self.settings)
        self._preload.keep_time(now)
        self.upgrade.keep_time(now)
        alone = not self.crew.children and not self.upgrade.under_way and not self.control.leaving
        if self.machine.state is SupervisorState.STOPPING and alone:
            self.machine.advance(SupervisorMove.ALL_GONE)

    # Workers

    def start(self, slot: int) -> None:
        """Start a worker in a slot, at once or when that can be done."""
        if slot >= self.slots or self._preload.holds(slot):
            return
        if len(self.crew.in_slot(slot)) > 1:  # a slot that was away: there is no record for a third one yet
            self.start_at[slot] = time.monotonic() + _START_AGAIN_S
            return
        try:
            child = self.crew.start(slot)
        except OSError as error:  # no memory, process or descriptor to be had; that may pass
            if self.machine.state is SupervisorState.BOOTING:
                raise
            logger.error("cannot start a process for worker %d: %s", slot + 1, error.strerror)
            if self.crew.serving(slot):
                self.roll.abort(slot)  # the old one goes on
            else:
                self.start_at[slot] = time.monotonic() + _START_AGAIN_S
            return
        self._budget.begin(child)
        self.selector.register(child.channel, selectors.EVENT_READ, child)
        logger.debug("worker %s started", child)
        self.hooks.call("worker_spawned", pid=child.pid, slot=child.slot)

    def _heads(self) -> range:
        """The slots that have a process of their own; with threads one process has them all."""
        return range(0, self.slots, self.crew.loops)

    def _lives(self, child: Child) -> bool:
        return self.crew.children.get(child.pid) is child

    def older(self, child: Child) -> list[Child]:
        """Those that serve in its slot and that it is to replace; a newer one has its own turn."""
        return [each for each in self.crew.serving(child.slot) if each.generation < child.generation]

    def _hear(self, child: Child) -> None:
        try:
            for message in child.channel.receive():
                event = message.get("event")
                if event == "loaded":
                    self.steering.let_listen(child, self.slots)
                elif event == "ready":
                    self._ready(child, float(message.get("seconds", 0)))
                elif event == "failed":
                    child.error, child.trace = str(message.get("error")), str(message.get("trace"))
                elif event == "running":
                    self.control.pass_on(child, message)
                elif event == "extend":
                    self._budget.extend(child, float(message.get("seconds", 0)))
                elif event == "full":
                    self.roll.renew(child)
                elif event == "closed" and self.machine.state is SupervisorState.STOPPING:
                    self.refuse_orphans()
        except EOFError:
            # Its end is known when it is reaped, not when its descriptor closes.
            self._forget(child)

    def _forget(self, child: Child) -> None:
        with contextlib.suppress(KeyError):  # forgotten before
            self.selector.unregister(child.channel)

    def _ready(self, child: Child, seconds: float) -> None:
        child.machine.advance(ChildMove.TOLD_READY)
        logger.info("worker %s ready in %.2f s", child, seconds)
        if self.machine.state is SupervisorState.BOOTING:
            self._announce()
            self.crew.scoreboard.tell_server(ready_ns=time.monotonic_ns())
        self.machine.advance(SupervisorMove.READY)
        child.booted = True
        self.steering.introduce(child, self.slots)
        self.hooks.call("worker_ready", pid=child.pid, slot=child.slot)
        self.inheritance.note_ready()
        if child.state is ChildState.READY and self._lives(child):
            for older in self.older(child):
                older.retire("retire", self.last_moment(older))
            self.roll.next()

    def _reap(self) -> None:
        self.control.reap()
        self.upgrade.reap()
        for child, code in self.crew.take_ended():
            self._hear(child)  # its last words
            self._forget(child)
            self.control.note_death(child.pid)
            self.upgrade.note_death(child.pid)
            state = ChildState.STARTING if self._budget.forget(child) else child.state
            child.bury()
            self.steering.note_death(child)
            self.hooks.call(
                "worker_exited", pid=child.pid, slot=child.slot, cause=child.describe_end(code)
            )
            self.deaths.note(child, state, code)
        self._preload.reap(stopping=self.machine.state is SupervisorState.STOPPING)
        if os.getpid() == 1:
            reap_strangers({*self.crew.children, *self._preload.pids, self.control.pid})

    # Reload, for developers

    def _reload(self, changed: list[str]) -> None:
        """Stop first, start then: a developer wants the new code and not the old answers."""
        if changed and self.machine.state is not SupervisorState.STOPPING:
            logger.info("reloading: %s changed", ", ".join(changed))
            moment = time.monotonic() + self.settings.reload.reload_grace
            for child in self.crew.children.values():
                if child.state <= ChildState.READY:
                    child.retire("retire", moment)
            for slot in self._heads():
                if not self.crew.in_slot(slot):
                    self.start_at[slot] = 0.0

    # Signals

    def last_moment(self, child: Child | None = None) -> float:
        """When a worker that is told to leave now has had its time; monotonic seconds."""
        if child is not None and child.state is ChildState.STARTING:
            return time.monotonic() + _BOOT_GRACE_S
        drain = self.settings.drain
        lifespan = self.settings.load.lifespan_shutdown_timeout
        wait = drain.pre_stop_delay + drain.drain_timeout + _CUT_S + drain.kill_grace
        return time.monotonic() + wait + (inf if lifespan is None else lifespan)

    def forget_plans(self) -> None:
        """No worker is started any more."""
        self.start_at.clear()
        self.roll.clear()
        self._preload.stop()

    def stop(self) -> None:
        """The first time: drain. Again: hurry."""
        again = self.machine.state is SupervisorState.STOPPING
        self.machine.advance(SupervisorMove.STOP)
        if again:
            logger.info("stopping at once")
        else:
            limit = self.settings.drain.drain_timeout
            logger.info("stopping: what runs gets up to %g s to finish; a second signal hurries", limit)
            self.hooks.call("supervisor_stopping")
        self.upgrade.stop(again=again)
        self.forget_plans()
        if not again:
            ready = [child for child in self.crew.children.values() if child.state is ChildState.READY]
            accepting = {slot for child in ready for slot in child.slots}
            kept = {slot for slot in range(self.slots) if self.upgrade.order_to_stop(slot) == "retire"}
            self._orphans = set(range(self.slots)) - accepting - kept
            if not accepting:
                self.refuse_orphans()  # else when a worker has left: each empties the queues of all
        for child in self.crew.children.values():
            order = self.upgrade.order_to_stop(child.slot)
            if child.state is ChildState.STARTING:
                child.retire(order, time.monotonic() + _BOOT_GRACE_S)
            elif again:
                child.retire("hurry", time.monotonic() + _HURRY_S)
            else:
                child.retire(order, self.last_moment())

    def refuse_orphans(self, more: Iterable[int] = ()) -> None:
        """Slots that nobody accepts from listen no more, unless they are another supervisor's."""
        self._orphans.update(slot for slot in more if self.upgrade.order_to_stop(slot) == "drain")
        while self._orphans:
            self.listeners.refuse(self._orphans.pop())

    def _quit(self) -> None:
        self.machine.advance(SupervisorMove.STOP)
        logger.warning("SIGQUIT: killing all workers")
        self.upgrade.quit()
        self.start_at.clear()
        self._preload.stop()
        for child in self.crew.children.values():
            child.kill()

    def _hang_up(self) -> None:
        if not self.settings.pool.reload_config_only:
            self.roll_all()
            return
        try:
            self._orders.obey("config", 0)
        except ValueError as error:
            logger.error("%s", error)

    def reconfigure(self) -> str:
        """Have the workers put into effect what has changed in the settings; what is done. Raises
        ValueError."""
        self.settings, text = reconfigure(self.settings, self._reread, self.crew)
        return text

    def roll_all(self) -> None:
        """Give every worker a successor, with new code."""
        runs = self.machine.state in (SupervisorState.RUNNING, SupervisorState.ROLLING)
        # During an upgrade nothing is imported in vain; else it rolls when the import is done.
        if runs and (self.upgrade.under_way or not self._preload.renew()):
            self.roll_workers()

    def roll_workers(self) -> None:
        """Give every worker a successor."""
        if self.machine.state in (SupervisorState.RUNNING, SupervisorState.ROLLING):
            self.notifier.reloading()
            if self.upgrade.postpones_roll():
                return
            logger.info("replacing all workers, one after the other")
            self.roll.replace_all(self._heads())


def _watch(settings: ReloadSettings) -> Watcher:
    from leanserve.supervisor.reload import Watcher  # development only

    return Watcher(settings)


_HANDLERS: dict[str, Callable[[Supervisor], object]] = {
    "SIGTERM": Supervisor.stop,
    "SIGINT": Supervisor.stop,
    "SIGQUIT": Supervisor._quit,
    "SIGHUP": Supervisor._hang_up,
    "SIGTTIN": lambda supervisor: supervisor.size.add(),
    "SIGTTOU": lambda supervisor: supervisor.size.remove(),
    "SIGUSR2": lambda supervisor: supervisor.upgrade.on_signal(),
}
