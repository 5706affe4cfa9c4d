"""A run: collect, train, validate, checkpoint, epoch by epoch. This class only composes; the work is elsewhere."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from gymnasium.vector import VectorEnv

from amago_core import interrupts
from amago_core.allocator import keep_freed_memory
from amago_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from amago_core.config import ExperimentConfig
from amago_core.errors import AmagoError, CheckpointError, RunDirError
from amago_core.evaluation import Evaluation, evaluate
from amago_core.learner import Learner, MetricMeans
from amago_core.policy import Policy
from amago_core.progress import ConsoleProgress, headline, padding_note
from amago_core.recorder import Recorder
from amago_core.rollout import Rollout
from amago_core.run_dir import RunDir, build_agent, load_agent_tensors
from amago_core.run_env import (
    describe_env,
    require_room_for_positions,
    require_same_spaces,
    restore_factories,
    spaces_of,
)
from amago_core.seeding import child_seed, numpy_generator, seed_globals
from amago_core.spaces import SpaceAdapter
from amago_core.state_tree import rng_state, set_rng_state
from amago_core.trackers import JSONLTracker, MultiTracker, Tracker
from amago_core.vector_envs import EnvFactory


class Experiment:
    """A training run in a directory of its own.

    Args:
        config: settings; `config.run_dir` must not hold anything yet.
        make_env: returns one environment to train in.
        make_vec_env: takes a number of lanes and returns a vector environment to train in; wins over `make_env`.
        make_val_env: like `make_env`, for validation; None validates in the training environment.
        make_val_vec_env: like `make_vec_env`, for validation.
        trackers: further places to log to, beside `metrics.jsonl` and the console.
        progress: show progress on the console.

    Raises:
        RunDirError: if the run directory is in use or cannot be written.
        EnvError: if the environment is no Gymnasium environment or its spaces are not supported.
        ConfigError: if the configuration does not fit the environment.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        make_env: Callable[[], gym.Env] | None = None,
        *,
        make_vec_env: Callable[[int], VectorEnv] | None = None,
        make_val_env: Callable[[], gym.Env] | None = None,
        make_val_vec_env: Callable[[int], VectorEnv] | None = None,
        trackers: Sequence[Tracker] = (),
        progress: bool = True,
    ) -> None:
        self._closed, self._resources = False, ExitStack()
        RunDir(Path(config.run_dir)).require_free()
        factory = EnvFactory(make_env, make_vec_env, config.env_mode)
        val_factory = factory
        if make_val_env is not None or make_val_vec_env is not None:
            val_factory = EnvFactory(make_val_env, make_val_vec_env, config.env_mode)
        with self._closed_after(failure_only=True):
            self._setup(config, factory, val_factory, trackers, progress)
            stored = describe_env(self.env, factory, val_factory)
            require_room_for_positions(config, stored)
            obs, _ = self.env.reset(seed=child_seed(config.seed, "env", 0))
            self.adapter.to_obs(obs, config.parallel_lanes)  # a broken environment claims no directory
            self.run = RunDir.create(config, stored)
            self._resources.callback(self.run.lock())
            self._start()

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        make_env: Callable[[], gym.Env] | None = None,
        *,
        make_vec_env: Callable[[int], VectorEnv] | None = None,
        make_val_env: Callable[[], gym.Env] | None = None,
        make_val_vec_env: Callable[[int], VectorEnv] | None = None,
        epochs: int | None = None,
        trackers: Sequence[Tracker] = (),
        progress: bool = True,
    ) -> Experiment:
        """Go on with a run that was stopped; it ends as if it had never been.

        Args:
            run_dir: of the run.
            make_env: as in `Experiment`; None makes the environment again through Gymnasium's registry.
            make_vec_env: as in `Experiment`.
            make_val_env: as in `Experiment`.
            make_val_vec_env: as in `Experiment`.
            epochs: new length of the run, from now on; None keeps the old one.
            trackers: as in `Experiment`.
            progress: as in `Experiment`.

        Returns:
            The experiment, ready for `learn`.

        Raises:
            RunDirError: if there is no run in `run_dir`, it has finished, or another process is training it.
            CheckpointError: if no checkpoint is intact, or it does not fit the run.
            EnvError: if the environment differs from the run's, or must be passed and was not.
        """
        run, config, stored = RunDir.open(run_dir)
        config = dataclasses.replace(config, epochs=config.epochs if epochs is None else epochs)
        factory, val_factory = restore_factories(
            stored, (make_env, make_vec_env), (make_val_env, make_val_vec_env), config.env_mode
        )
        self = cls.__new__(cls)
        self._closed, self._resources, self.run = False, ExitStack(), run
        with self._closed_after(failure_only=True):
            self._resources.callback(run.lock())
            checkpoint = load_checkpoint(run.checkpoints) if run.has_begun() else None
            run.require_unfinished(0 if checkpoint is None else checkpoint.state.get("epoch", 0), config.epochs)
            self._setup(config, factory, val_factory, trackers, progress)
            require_same_spaces(self.env, stored)
            require_room_for_positions(config, stored)
            if checkpoint is None:
                self._start()
            else:
                self._continue(checkpoint)
            run.reopen(config)
        return self

    @contextmanager
    def _closed_after(self, *, failure_only: bool = False) -> Iterator[None]:
        """Close at the end of a block; what goes wrong while closing never hides what went wrong inside."""
        try:
            yield
        except BaseException:
            with suppress(Exception):
                self.close()
            raise
        if not failure_only:
            self.close()

    def _setup(
        self,
        config: ExperimentConfig,
        factory: EnvFactory,
        val_factory: EnvFactory,
        trackers: Sequence[Tracker],
        progress: bool,
    ) -> None:
        """Everything that needs no run directory."""
        self.config = config
        device = config.torch_device()
        if device.type == "cpu":
            keep_freed_memory()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        seed_globals(child_seed(config.seed, "globals"))
        self.env = factory.build(config.parallel_lanes)
        self._resources.callback(self.env.close)
        self.adapter = SpaceAdapter(self.env.single_observation_space, self.env.single_action_space)
        self._val_factory = val_factory
        self._val_env: VectorEnv | None = None
        if config.val_interval:
            self._validation_env()
        torch.manual_seed(child_seed(config.seed, "torch"))
        self.agent = build_agent(config, self.adapter).to(device)
        self.learner = Learner(self.agent, config.learner, total_updates=self._total_updates())
        self.policy = Policy(
            self.agent, self.adapter, sample=config.sample_actions_train, seed=child_seed(config.seed, "collect")
        )
        self.epoch = 0
        self.frames = 0
        self._restarts = 0
        self._seconds = 0.0
        self._sampler = numpy_generator(config.seed, "sampler")
        self._older_state: list[dict[str, Any]] = []
        self._extra_trackers = tuple(trackers)
        self._show_progress = progress
        self._told_of_padding = False

    def _open_outputs(self) -> None:
        """Everything that writes into the run directory."""
        config = self.config
        self.dataset = self.run.open_buffer(config, self.adapter.schema)
        self._resources.callback(self.dataset.close)
        self.recorder = Recorder(
            self.adapter.schema,
            config.parallel_lanes,
            self.dataset.append,
            max_transitions=config.trajectory_limit,
            stagger=config.max_seq_len if config.stagger_trajectories else 0,
            seed=child_seed(config.seed, "recorder"),
        )
        exploration = config.exploration.build(
            config.parallel_lanes, self.adapter.action_spec, child_seed(config.seed, "exploration")
        )
        self.rollout = Rollout(self.env, self.policy, exploration=exploration, recorder=self.recorder)
        self._jsonl = JSONLTracker(self.run.metrics)
        self._tracker = MultiTracker([self._jsonl, *self._extra_trackers])
        self._resources.callback(self._tracker.close)

    def _total_updates(self) -> int:
        return max(0, self.config.epochs - self.config.start_learning_at) * self.config.batches_per_epoch

    def learn(self) -> dict[str, Any]:
        """Run the remaining epochs.

        Returns:
            What `summary.json` holds.

        Raises:
            KeyboardInterrupt: after Ctrl-C, between two steps and with everything closed; the run can be resumed.
            RunDirError: if `learn` or `close` was called before.
        """
        if self._closed:
            raise RunDirError(f"this experiment is closed: Experiment.resume({str(self.run.path)!r}) goes on with it")
        console = ConsoleProgress(str(self.run.path), file=None if self._show_progress else StringIO())
        with interrupts.postponed(), self._closed_after(), console as progress:
            progress.update(
                epoch=self.epoch,
                epochs=self.config.epochs,
                frames=self.frames,
                updates=self.learner.updates,
                total_updates=self._total_updates() or None,
            )
            while self.epoch < self.config.epochs:
                self._run_epoch(progress)
            return self._finish(progress)

    def _run_epoch(self, progress: ConsoleProgress) -> None:
        config, epoch = self.config, self.epoch
        started = time.perf_counter()
        if config.val_interval and epoch % config.val_interval == 0:
            self._validate(progress)
        record: dict[str, Any] = {"epoch": epoch}
        collecting = time.perf_counter()
        if epoch >= config.start_collecting_at and config.rollout_steps_per_epoch:
            progress.update(phase="collect", phase_done=None, phase_total=None)
            record.update(self._collect())
            progress.update(frames=self.frames)
        record.update({f"buffer/{k}": v for k, v in self.dataset.end_of_collection(epoch).items()})
        training = time.perf_counter()
        if epoch >= config.start_learning_at and config.batches_per_epoch and self.dataset.ready:
            self._tell_of_padding(progress)
            record.update(self._train(progress))
        finished = time.perf_counter()
        self.epoch += 1
        self._seconds += finished - started
        record.update(self._counters())
        record["time/collect"] = training - collecting
        record["time/train"] = finished - training
        record["time/total"] = self._seconds
        self._tracker.log(self.learner.updates, record)
        progress.epoch_end(epoch=self.epoch, **self._counters(), **headline(record))
        if self.epoch % config.ckpt_interval == 0 or self.epoch == config.epochs:
            self._save_checkpoint()

    def _counters(self) -> dict[str, int]:
        return {"frames": self.frames, "updates": self.learner.updates}

    def _collect(self) -> dict[str, float]:
        self.recorder.policy_version = self.learner.updates
        stats = self.rollout.collect(self.config.rollout_steps_per_epoch)
        self.frames += stats.frames
        self.dataset.commit()
        return {f"collect/{name}": value for name, value in stats.summary().items()}

    def _train(self, progress: ConsoleProgress) -> dict[str, float]:
        config = self.config
        progress.update(phase="train", phase_done=0, phase_total=config.batches_per_epoch)
        means = MetricMeans()
        for index in range(config.batches_per_epoch):
            interrupts.check()
            batch: Any = self.dataset.sample(config.batch_size, config.max_seq_len, self._sampler)
            if config.agent.skip_padding:
                batch = batch.trim()
            detailed = (self.learner.updates + 1) % config.log_interval == 0
            means.add(self.learner.update(batch.to(self.agent.device), detailed=detailed))
            progress.update(updates=self.learner.updates, phase_done=index + 1)
        return {f"train/{name}": value for name, value in means.compute().items()}

    def _tell_of_padding(self, progress: ConsoleProgress) -> None:
        if self._told_of_padding:
            return
        self._told_of_padding = True
        note = padding_note(int(self.dataset.table.transitions.max()), self.config.max_seq_len)
        if note:
            progress.print(note)

    def _validate(self, progress: ConsoleProgress) -> dict[str, float]:
        progress.update(phase="validate", phase_done=None, phase_total=None)
        record = {f"val/{name}": value for name, value in self.evaluate().summary().items()}
        self._tracker.log(self.learner.updates, {"epoch": self.epoch, **self._counters(), **record})
        progress.update(headline(record))
        return record

    def evaluate(self, *, seed: int | None = None) -> Evaluation:
        """Evaluate the current policy in the validation environments.

        Args:
            seed: of the environments' reset; None takes the run's own validation seed, the same at every call.

        Returns:
            `val_lanes * val_episodes_per_lane` finished episodes.
        """
        config = self.config
        seed = child_seed(config.seed, "validation") if seed is None else seed
        policy = Policy(self.agent, self.adapter, sample=config.sample_actions_val, seed=seed)
        return evaluate(policy, self._validation_env(), seed=seed, episodes_per_lane=config.val_episodes_per_lane)

    def _validation_env(self) -> VectorEnv:
        if self._val_env is None:
            env = self._val_factory.build(self.config.val_lanes)
            self._resources.callback(env.close)
            require_same_spaces(env, spaces_of(self.env), "the validation environment")
            self._val_env = env
        return self._val_env

    def _start(self) -> None:
        """Begin a run, with a checkpoint of the beginning."""
        self._open_outputs()
        self.rollout.restart(child_seed(self.config.seed, "env", 0))
        self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        """Write the whole state; afterwards the run goes on exactly as a resumed one would."""
        if not self.rollout.exact:
            self.recorder.flush()
        self.dataset.commit()
        self._jsonl.sync()
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "frames": self.frames,
            "seconds": self._seconds,
            "restarts": self._restarts,
            "metrics_offset": self._jsonl.offset,
            "learner": self.learner.state_dict(),
            "dataset": self.dataset.state_dict(),
            "sampler": self._sampler.bit_generator.state,
            "rollout": self.rollout.state_dict(),
            "rng": rng_state(),
        }
        save_checkpoint(self.run.checkpoints, f"epoch_{self.epoch:06d}", self.agent.state_dict(), state, keep=2)
        # The checkpoint before stays usable, in case this one is found damaged.
        self.dataset.purge(keep=self._older_state)
        self._older_state = [state["dataset"]]
        self._restart_envs()

    def _continue(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, as `_save_checkpoint` left it."""
        state = checkpoint.state
        load_agent_tensors(self.agent, checkpoint.tensors, str(checkpoint.path))
        self._open_outputs()
        try:
            self.learner.load_state_dict(state["learner"])
            self.epoch, self.frames, self._seconds = state["epoch"], state["frames"], state["seconds"]
            self._restarts = state["restarts"]
            self._sampler.bit_generator.state = state["sampler"]
            self.dataset.load_state_dict(state["dataset"])
            self.rollout.load_state_dict(state["rollout"])
            self._jsonl.truncate_to(state["metrics_offset"])
            set_rng_state(state["rng"])
        except AmagoError:
            raise
        except OSError as error:
            raise RunDirError(f"run_dir {str(self.run.path)!r} cannot be used: {error.strerror or error}") from error
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint {checkpoint.path} does not fit this run: {error}") from error
        self._older_state = [state["dataset"]]
        self._restart_envs()

    def _restart_envs(self) -> None:
        """Environments that cannot be saved begin anew after every checkpoint, in this run and in a resumed one."""
        if self.rollout.exact:
            return
        self._restarts += 1
        self.rollout.restart(child_seed(self.config.seed, "env", self._restarts))

    def _finish(self, progress: ConsoleProgress) -> dict[str, Any]:
        record = self._validate(progress) if self.config.val_interval else {}
        progress.epoch_end(phase=None)
        totals = {"epochs": self.epoch, **self._counters(), "seconds": self._seconds, "seed": self.config.seed}
        return self.run.write_summary({**totals, **record})

    def close(self) -> None:
        """Release environments, files and the directory; safe to call twice."""
        self._closed, self._val_env = True, None
        self._resources.close()
