"""A run: collect, train, validate, checkpoint, epoch by epoch. This class only composes; the work is elsewhere."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv

from amago_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, write_text_atomic
from amago_core.config import ExperimentConfig
from amago_core.errors import CheckpointError, RunDirError
from amago_core.evaluation import Evaluation, evaluate
from amago_core.learner import Learner
from amago_core.policy import Policy
from amago_core.provenance import provenance
from amago_core.recorder import Recorder
from amago_core.rollout import Rollout
from amago_core.run_dir import RunDir, build_agent, describe_env, load_agent_tensors, require_same_spaces
from amago_core.seeding import child_seed, numpy_generator
from amago_core.spaces import SpaceAdapter
from amago_core.state_tree import rng_state, set_rng_state
from amago_core.progress import ConsoleProgress
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
        factory = EnvFactory(make_env, make_vec_env, config.env_mode)
        val_factory = factory
        if make_val_env is not None or make_val_vec_env is not None:
            val_factory = EnvFactory(make_val_env, make_val_vec_env, config.env_mode)
        self._setup(config, factory, val_factory, trackers, progress)
        stored = describe_env(self.env, factory, val_factory)
        self.run = RunDir.create(config, stored)
        self._open_outputs()
        self.rollout.restart(child_seed(config.seed, "env", 0))
        self._save_checkpoint()

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
            epochs: new length of the run; None keeps the old one.
            trackers: as in `Experiment`.
            progress: as in `Experiment`.

        Returns:
            The experiment, ready for `learn`.

        Raises:
            RunDirError: if there is no run in `run_dir`, or it has finished.
            CheckpointError: if no checkpoint is intact, or it belongs to another agent.
            EnvError: if the environment differs from the run's, or must be passed and was not.
        """
        run, config, stored = RunDir.open(run_dir)
        run.require_writable()
        config = dataclasses.replace(config, run_dir=str(run_dir), epochs=epochs or config.epochs)
        checkpoint = load_checkpoint(run.checkpoints)
        if checkpoint.state["epoch"] >= config.epochs:
            raise RunDirError(
                f"run_dir {str(run_dir)!r} holds a finished run ({checkpoint.state['epoch']} epochs): "
                "there is nothing to resume, unless you give it more epochs"
            )
        factory = EnvFactory.restore(stored["factory"], make_env, make_vec_env, config.env_mode)
        if (make_env or make_vec_env) and not (make_val_env or make_val_vec_env):
            val_factory = factory
        else:
            val_factory = EnvFactory.restore(stored["val_factory"], make_val_env, make_val_vec_env, config.env_mode)
        self = cls.__new__(cls)
        self._setup(config, factory, val_factory, trackers, progress)
        require_same_spaces(self.env, stored)
        self.run = run
        self._load_checkpoint(checkpoint)
        return self

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
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self._val_factory = val_factory
        self._val_env: VectorEnv | None = None
        self.env = factory.build(config.parallel_lanes)
        self.adapter = SpaceAdapter(self.env.single_observation_space, self.env.single_action_space)
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
        self._extra_trackers = tuple(trackers)
        self._show_progress = progress
        self._shown: dict[str, float] = {}

    def _open_outputs(self, metrics_offset: int | None = None) -> None:
        """Everything that writes into the run directory."""
        config = self.config
        self.dataset = config.replay.build(self.run.buffer, self.adapter.schema)
        self.recorder = Recorder(
            self.adapter.schema, config.parallel_lanes, self.dataset.append, max_transitions=config.trajectory_limit
        )
        exploration = config.exploration.build(
            config.parallel_lanes, self.adapter.action_spec, child_seed(config.seed, "exploration")
        )
        self.rollout = Rollout(self.env, self.policy, exploration=exploration, recorder=self.recorder)
        self._jsonl = JSONLTracker(self.run.metrics)
        if metrics_offset is not None:
            self._jsonl.truncate_to(metrics_offset)
        self._tracker = MultiTracker([self._jsonl, *self._extra_trackers])

    def _total_updates(self) -> int:
        return max(0, self.config.epochs - self.config.start_learning_at) * self.config.batches_per_epoch

    def learn(self) -> dict[str, Any]:
        """Run the remaining epochs.

        Returns:
            What `summary.json` holds.

        Raises:
            KeyboardInterrupt: passed on after everything is closed; the run can be resumed.
        """
        try:
            with ConsoleProgress(str(self.run.path), file=None if self._show_progress else StringIO()) as progress:
                self._describe_progress(progress)
                while self.epoch < self.config.epochs:
                    self._run_epoch(progress)
                progress.update(phase="validate")
                record = self._validate()
                self._tracker.log(self.learner.updates, {"epoch": self.epoch, **self._counters(), **record})
                self._show(progress, record, end_of_epoch=True)
            return self._write_summary(record)
        finally:
            self.close()

    def _describe_progress(self, progress: ConsoleProgress) -> None:
        progress.update(
            epoch=self.epoch,
            epochs=self.config.epochs,
            frames=self.frames,
            updates=self.learner.updates,
            total_updates=self._total_updates() or None,
        )

    def _run_epoch(self, progress: ConsoleProgress) -> None:
        config, epoch = self.config, self.epoch
        started = time.perf_counter()
        record: dict[str, Any] = {"epoch": epoch}
        if config.val_interval and epoch % config.val_interval == 0:
            progress.update(phase="validate", phase_done=0, phase_total=None)
            validated = self._validate()
            self._tracker.log(self.learner.updates, {"epoch": epoch, **self._counters(), **validated})
            self._show(progress, validated)
        collecting = time.perf_counter()
        if epoch >= config.start_collecting_at and config.rollout_steps_per_epoch:
            progress.update(phase="collect")
            record.update(self._collect())
        record.update({f"buffer/{k}": v for k, v in self.dataset.end_of_collection(epoch).items()})
        training = time.perf_counter()
        if epoch >= config.start_learning_at and config.batches_per_epoch and self.dataset.ready:
            record.update(self._train(progress))
        finished = time.perf_counter()
        self.epoch += 1
        self._seconds += finished - started
        record.update(self._counters())
        record["time/collect"] = training - collecting
        record["time/train"] = finished - training
        record["time/total"] = self._seconds
        self._tracker.log(self.learner.updates, record)
        self._show(progress, record, end_of_epoch=True)
        if self.epoch % config.ckpt_interval == 0 or self.epoch == config.epochs:
            self._save_checkpoint()

    def _counters(self) -> dict[str, int]:
        return {"frames": self.frames, "updates": self.learner.updates}

    def _collect(self) -> dict[str, float]:
        stats = self.rollout.collect(self.config.rollout_steps_per_epoch)
        self.frames += stats.frames
        self.dataset.commit()
        return {f"collect/{name}": value for name, value in stats.summary().items()}

    def _train(self, progress: ConsoleProgress) -> dict[str, float]:
        config = self.config
        progress.update(phase="train", phase_total=config.batches_per_epoch)
        sums: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = defaultdict(int)
        for index in range(config.batches_per_epoch):
            batch = self.dataset.sample(config.batch_size, config.max_seq_len, self._sampler)
            if config.agent.skip_padding:
                batch = batch.trim()
            detailed = (self.learner.updates + 1) % config.log_interval == 0
            metrics = self.learner.update(batch.to(self.agent.device), detailed=detailed)
            for name, value in metrics.items():
                sums[name] = sums[name] + value if name in sums else value
                counts[name] += 1
            progress.update(updates=self.learner.updates, phase_done=index + 1)
        return {f"train/{name}": float(value) / counts[name] for name, value in sums.items()}

    def _validate(self) -> dict[str, float]:
        if not self.config.val_interval:
            return {}
        result = self.evaluate()
        return {f"val/{name}": value for name, value in result.summary().items()}

    def evaluate(self, *, seed: int | None = None) -> Evaluation:
        """Evaluate the current policy in the validation environments.

        Args:
            seed: of the environments' reset; None takes the run's own validation seed, the same at every call.

        Returns:
            `val_lanes * val_episodes_per_lane` finished episodes.
        """
        config = self.config
        if self._val_env is None:
            self._val_env = self._val_factory.build(config.val_lanes)
        seed = child_seed(config.seed, "validation") if seed is None else seed
        policy = Policy(self.agent, self.adapter, sample=config.sample_actions_val, seed=seed)
        return evaluate(policy, self._val_env, seed=seed, episodes_per_lane=config.val_episodes_per_lane)

    def _show(self, progress: ConsoleProgress, record: dict[str, Any], *, end_of_epoch: bool = False) -> None:
        attempts = sorted(
            (k for k in record if k.startswith("val/attempt_") and k.endswith("/success")),
            key=lambda k: int(k.split("_")[1].split("/")[0]),
        )
        if "val/return" in record:
            self._shown["return"] = record["val/return"]
        if "collect/return" in record:
            self._shown["return_while_exploring"] = record["collect/return"]
        if attempts:
            self._shown["success_first"], self._shown["success_last"] = record[attempts[0]], record[attempts[-1]]
        show = progress.epoch_end if end_of_epoch else progress.update
        show(epoch=self.epoch, **self._counters(), **self._shown)

    def _save_checkpoint(self) -> None:
        """Write the whole state; afterwards the run goes on exactly as a resumed one would."""
        if not self.rollout.exact:
            self.recorder.flush()
        self.dataset.commit()
        self._jsonl.sync()
        state = {
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
        save_checkpoint(self.run.checkpoints, f"epoch_{self.epoch:06d}", self.agent.state_dict(), state)
        self.dataset.purge()
        if not self.rollout.exact:
            self._restart_envs()

    def _restart_envs(self) -> None:
        """Environments that cannot be saved begin anew after every checkpoint, in this run and in a resumed one."""
        self._restarts += 1
        self.rollout.restart(child_seed(self.config.seed, "env", self._restarts))

    def _load_checkpoint(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        load_agent_tensors(self.agent, checkpoint.tensors, str(checkpoint.path))
        try:
            self.learner.load_state_dict(state["learner"])
            self.epoch, self.frames, self._seconds = state["epoch"], state["frames"], state["seconds"]
            self._restarts = state["restarts"]
            self._sampler.bit_generator.state = state["sampler"]
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"checkpoint {checkpoint.path} does not fit this run: {error!r}") from error
        self._open_outputs(metrics_offset=state["metrics_offset"])
        self.dataset.load_state_dict(state["dataset"])
        self.rollout.load_state_dict(state["rollout"])
        if not self.rollout.exact:
            self._restart_envs()
        set_rng_state(state["rng"])

    def _write_summary(self, record: dict[str, float]) -> dict[str, Any]:
        summary = {
            "epochs": self.epoch,
            **self._counters(),
            "seconds": self._seconds,
            "seed": self.config.seed,
            **record,
            "versions": provenance(),
        }
        write_text_atomic(self.run.summary, json.dumps(summary, indent=2))
        return summary

    def close(self) -> None:
        """Release environments and files; safe to call twice."""
        self.env.close()
        if self._val_env is not None:
            self._val_env.close()
            self._val_env = None
        self._tracker.close()
        self.dataset.close()
