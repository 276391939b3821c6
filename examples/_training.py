"""The run itself: builds what the settings say, goes on from a checkpoint, trains, ends."""

from __future__ import annotations

import argparse
import os
import random
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _arguments
import _devices
import _resume
import torch
from _attempts import Attempts, is_out_of_memory
from _data import BatchLoader, Crops, read_text
from _gpt import GPT, GPTConfig
from _losslog import Audit, Entry, History, LossLog, read_log
from _parts import StopRequest, WarmUp
from _progress import Progress, say
from _resume import Candidate, RunRecord
from _settings import CONFIGS, Config, Effect, Setting, Settings, TrainError, changes, table
from torch import Tensor

from pccheck_ext import CheckpointError, LayerwiseCheckpointTrainer

__all__ = ["run"]

FINAL = "final"
LOG = "losses.jsonl"


def run(
    options: argparse.Namespace, device: Setting, environment: Mapping[str, str], cores: int
) -> int:
    """Train as the command line says; the exit status. `environment`: as the user left it."""
    config = CONFIGS[options.config]
    text, text_name = read_text(options.data, config.context)
    rules = _devices.device_settings(
        _devices.kind_of(device.value), cores, config, environment, _arguments.asked(options)
    )
    candidates = _candidates(options)
    record = _resume.recorded(candidates[0]) if candidates else None
    settings = _settings(options, device, rules, text_name)
    if record is not None:
        _resume.check_architecture(candidates[0], record, settings)
        settings = _with_recorded_pieces(settings, record)
    _print_table(settings, record)

    _devices.apply(torch, device.value, settings, say)
    torch.set_num_threads(settings["torch threads"])
    try:
        with StopRequest() as stop:
            parts = _build(options.output_dir, config, settings, text)
            with parts.trainer:
                return Run(parts, config, settings, options, stop).go(candidates)
    except (CheckpointError, OSError) as error:
        raise TrainError(str(error)) from error


# ---- Before anything is written ------------------------------------------------------------------


def _candidates(options: argparse.Namespace) -> list[Candidate]:
    """What to try to go on from, in this order."""
    directory = options.output_dir
    found = _resume.find(directory)
    if options.resume_from_checkpoint is not None:
        chosen = _resume.named(options.resume_from_checkpoint, directory)
        if found and chosen.path.resolve().parent != directory.resolve():
            raise TrainError(
                f"{chosen.path} is another run's, and --output-dir {directory} holds checkpoints "
                f"of its own ({', '.join(map(str, found))}): name a new --output-dir"
            )
        return [chosen]
    if options.auto_resume:
        if not found:
            say(f"--auto-resume: {directory} holds no checkpoint, beginning with step 1")
        return found
    if found:
        raise TrainError(
            f"{directory} holds checkpoints already ({', '.join(map(str, found))}): give "
            "--auto-resume to go on from the newest, or another --output-dir to begin anew"
        )
    return []


def _settings(
    options: argparse.Namespace, device: Setting, rules: list[Setting], text: str
) -> Settings:
    """All settings of this run, those that the device has rules for and the others."""

    def either(name: str, value: Any, default: Any, effect: Effect, note: str = "") -> Setting:
        if value is None:
            return Setting(name, default, "default", effect, note)
        return Setting(name, value, "command line", effect, note)

    config = CONFIGS[options.config]
    kernels = torch.backends.cpu.get_cpu_capability()
    steps = options.max_steps
    return Settings(
        [
            Setting("torch", str(torch.__version__), "environment", "only bits"),
            device,
            Setting("CPU kernels", kernels, "environment", "only bits"),
            either("torch threads", options.torch_threads, torch.get_num_threads(), "only bits"),
            *config.settings(),
            either("data", text if options.data else None, text, "yes"),
            either("seed", options.seed, 0, "only bits"),
            Setting("max steps", config.max_steps, "config", "no")
            if steps is None
            else Setting("max steps", steps, "command line", "no"),
            *rules,
            either("checkpoint every", options.checkpoint_every, 1, "no", "in steps"),
            either("writer threads", options.num_threads, 4, "no"),
            either("monitor mode", options.use_monitor or None, False, "no"),
        ]
    )


def _with_recorded_pieces(settings: Settings, record: RunRecord) -> Settings:
    """What did not fit into memory as a whole before does not now; nor would the bits be equal."""
    was_reduced = 0 < record.micro_batch < record.settings.get("batch size", 0)
    is_default = any(s.name == "micro-batch size" and s.source == "default" for s in settings)
    if not was_reduced or not is_default or record.micro_batch >= settings["batch size"]:
        return settings
    note = "--micro-batch-size sets it anew"
    return settings.replaced(
        Setting("micro-batch size", record.micro_batch, "checkpoint", "only bits", note)
    )


def _print_table(settings: Settings, record: RunRecord | None) -> None:
    now = settings.deciding()
    before = record.settings if record is not None else {}
    differing = changes(before, {name: now[name] for name in before if name in now})
    for line in table(settings, {name: was for name, (was, _) in differing.items()}):
        say(line)
    for name, (was, new) in differing.items():
        say(f"warning: {name} was {was!r} in the checkpoint; this run goes on with {new!r}")


# ---- Building ------------------------------------------------------------------------------------


@dataclass
class Parts:
    """What a run consists of."""

    model: GPT
    optimizer: torch.optim.Optimizer
    schedule: WarmUp
    loader: BatchLoader
    record: RunRecord
    trainer: LayerwiseCheckpointTrainer


def _build(output_dir: Path, config: Config, settings: Settings, text: Tensor) -> Parts:
    random.seed(settings["seed"])
    torch.manual_seed(settings["seed"])
    model = GPT(GPTConfig(**config.architecture(), dropout=config.dropout)).to(settings["device"])
    optimizer = torch.optim.AdamW(model.param_groups(config.weight_decay), betas=(0.9, 0.95))
    schedule = WarmUp(optimizer, settings["learning rate"], config.warm_up_steps)
    crops = Crops(text, settings["batch size"], config.context, settings["seed"])
    loader = BatchLoader(crops, settings["dataloader workers"], settings["pin memory"])
    record = RunRecord(settings.deciding(), settings["micro-batch size"])
    try:
        trainer = LayerwiseCheckpointTrainer(
            model,
            optimizer,
            use_monitor=settings["monitor mode"],
            num_threads=settings["writer threads"],
            checkpoint_dir=output_dir,
            checkpoint_every=settings["checkpoint every"],
            extra={"schedule": schedule, "loader": loader, "run": record},
        )
    except (NotImplementedError, ValueError) as error:
        raise TrainError(f"no checkpoints can be made in {output_dir}: {error}") from error
    return Parts(model, optimizer, schedule, loader, record, trainer)


# ---- Training ------------------------------------------------------------------------------------


class Run:
    """From the checkpoint that is gone on from to the final one."""

    def __init__(
        self,
        parts: Parts,
        config: Config,
        settings: Settings,
        options: argparse.Namespace,
        stop: StopRequest,
    ) -> None:
        self.parts = parts
        self.trainer = parts.trainer
        self.config = config
        self.settings = settings
        self.output_dir: Path = options.output_dir
        self.wants_audit: bool = options.audit
        self.chose_pieces = options.micro_batch_size is not None
        self.stop = stop

    def go(self, candidates: list[Candidate]) -> int:
        """Train to the last step, or until asked to stop; the exit status."""
        origin = self._resume(candidates) if candidates else None
        start, last = self.trainer.training_step, self.settings["max steps"]
        if start >= last:
            say(f"nothing to do: step {start} has been reached, the last one is {last}")
            if start == last and not (self.output_dir / FINAL).exists():
                self._finish()
            return 0
        history = read_log(self.output_dir / LOG)
        if history.torn:
            say(f"{history.path}: its end, torn by a crash, is cut off")
        progress = Progress(start, last)
        try:
            audit = Audit(history, start, self._why_no_audit(history, origin), progress.line)
            audit.begin()
            attempts = self._attempts(progress)
            deciding = self.settings.deciding()
            with LossLog(history, start, deciding, audited=self.wants_audit) as log:
                while self.trainer.training_step < last and self.stop.signal is None:
                    self._take_step(attempts, audit, log, progress)
            audit.end()
        finally:
            progress.close()
            self.parts.loader.close()
        if self.trainer.training_step < last and self.stop.signal is not None:
            return self._stopped(self.stop.signal, start)
        self._finish()
        return 0

    def _resume(self, candidates: list[Candidate]) -> Candidate:
        groups = self.parts.optimizer.param_groups
        told = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in groups]
        origin = _resume.resume(self.trainer, candidates, self.settings, say)
        say(f"resumed from {origin.path} at step {self.trainer.training_step}")
        # The checkpoint brought its own hyper-parameters along; this run's are those it was told.
        for group, values in zip(groups, told, strict=True):
            group.update(values)
        record = _resume.recorded(origin)
        seed = self.settings["seed"]
        if record is not None and record.settings.get("seed", seed) != seed:
            random.seed(seed)
            torch.manual_seed(seed)
        return origin

    def _why_no_audit(self, history: History, origin: Candidate | None) -> str:
        if not self.wants_audit:
            return "off (--no-audit)"
        if origin is not None and origin.is_old:
            return "does not apply: files of the old form hold no random numbers"
        device = self.settings["device"]
        if device != "cpu" and not self.settings["deterministic algorithms"]:
            return f"does not apply: {device} repeats itself bit for bit only with --deterministic"
        differing = history.differing(self.trainer.training_step, self.settings.deciding())
        if differing:
            return f"does not apply: changed since those steps were logged: {', '.join(differing)}"
        return ""

    def _attempts(self, progress: Progress) -> Attempts:
        self.parts.model.train()
        return Attempts(
            self.parts.model,
            self.parts.model.loss,
            torch.device(self.settings["device"]),
            clear=self.trainer.zero_grad,
            clip=self.config.gradient_clip,
            micro_batch=self.settings["micro-batch size"],
            modes=self.settings["compile"],
            announce=progress.line,
        )

    def _take_step(
        self, attempts: Attempts, audit: Audit, log: LossLog, progress: Progress
    ) -> None:
        parts = self.parts
        step = self.trainer.training_step + 1
        if not self.chose_pieces:
            # Where memory ran out before, it does so before this step at the latest.
            logged = audit.micro_batch(step) or attempts.micro_batch
            attempts.micro_batch = min(attempts.micro_batch, logged)
        loss, norm = attempts.gradients(*next(parts.loader))
        rate = parts.schedule.rate
        entry = Entry(step, loss, norm, rate, attempts.micro_batch, str(attempts.compiled))
        audit.check(entry)
        self._update(step, loss)
        # Before the step is sealed: what a checkpoint holds has always been logged.
        log.write(entry)
        parts.schedule.step()
        parts.record.micro_batch = attempts.micro_batch
        self.trainer.end_step()
        progress.show(step, loss, rate)

    def _update(self, step: int, loss: float) -> None:
        try:
            self.trainer.step(loss)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainError(
                f"out of memory while step {step} was updating parameters, which cannot be taken "
                f"back: some layers are updated, some are not ({error}). Go on from the newest "
                "checkpoint with --auto-resume, and a smaller --config or more memory"
            ) from error

    # -- the end -----------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Save as `final`. One of an earlier end is left aside, as the engine does with others."""
        final = self.output_dir / FINAL
        if final.exists():
            self._save_step()  # until the new one is there, this has to stand for it
            aside = _free_name(self.output_dir, f"{FINAL}.stale")
            os.rename(final, aside)
            say(f"the {FINAL} checkpoint of an earlier end is left aside as {aside.name}")
        self.trainer.save_full_checkpoint(FINAL)
        self.trainer.wait()
        stats = self.trainer.stats()
        say(
            f"done: step {self.trainer.training_step}, {stats['checkpoints_committed']} "
            f"checkpoints committed, {stats['stall_s']:.3g} s of stall in all; {final} is complete"
        )

    def _save_step(self) -> Path:
        """The committed checkpoint of the last step taken; made now where none was due."""
        self.trainer.wait()
        path = self.output_dir / f"step-{self.trainer.training_step:08d}"
        if not path.exists():
            self.trainer.save_full_checkpoint(path.name)
            self.trainer.wait()
        return path

    def _stopped(self, number: signal.Signals, start: int) -> int:
        if self.trainer.training_step == start:
            say(f"stopped by {number.name} before any step was taken")
        else:
            say(
                f"stopped by {number.name}: step {self.trainer.training_step} and everything "
                f"before it is in {self._save_step()}"
            )
        say(f"to go on: the same command with --output-dir {self.output_dir} --auto-resume")
        return 128 + number


def _free_name(directory: Path, name: str) -> Path:
    path, number = directory / name, 2
    while path.exists():
        path, number = directory / f"{name}-{number}", number + 1
    return path
