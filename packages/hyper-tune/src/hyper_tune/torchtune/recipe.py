"""One fine-tuning run, from its settings to the exported adapter."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torchtune import training

from hyper_tune import parallel
from hyper_tune.assembly import assemble
from hyper_tune.checkpoint import has_checkpoints, read_newest, write_checkpoint
from hyper_tune.errors import PERSONS_MISTAKES, StoppedError, UserError
from hyper_tune.peers import Peers
from hyper_tune.rank_agreement import refuse_disagreement, replicated_tensors
from hyper_tune.run_folder import RunFolder
from hyper_tune.sampling import batch_positions, derive_seed, total_steps
from hyper_tune.step import StepReport
from hyper_tune.stop_request import StopRequest
from hyper_tune.torchtune.base_model import (
    base_layout,
    build_on_meta,
    check_files,
    describe_files,
    load_,
    open_weights,
    prepare_,
)
from hyper_tune.torchtune.batches import Batch, collate
from hyper_tune.torchtune.compilation import check_compilation
from hyper_tune.torchtune.components import build_tokenizer
from hyper_tune.torchtune.evaluate import Questions, held_out_loss, peak_memory_mib
from hyper_tune.torchtune.identity import run_identity
from hyper_tune.torchtune.loggers import Loggers
from hyper_tune.torchtune.optimization import build_optimizer, build_scheduler, try_optimizer
from hyper_tune.torchtune.reporting import Reporter
from hyper_tune.torchtune.results import say, step_row, write_results
from hyper_tune.torchtune.samples import Samples, open_training_data
from hyper_tune.torchtune.saved_state import restore_, state_of
from hyper_tune.torchtune.settings import RecipeSettings, warn_of_no_effect


class FineTuning:
    """Fine-tune a frozen torchtune decoder by a low-rank method; resume exactly.

    A context manager: entering it checks every setting and builds everything, `train` runs.
    One process or many behave alike: the base is sharded over the processes, factors and
    hypernetworks are on each, gradients are summed once per optimizer step.

    Raises:
        UserError: a setting, file or record that cannot be used, before any training.
        StoppedError: from `train`, once it is saved that a process was sent SIGTERM.
        PeerLostError: another process has ended, or did not answer in time.
    """

    def __init__(self, settings: RecipeSettings) -> None:
        self.settings = settings
        self.folder = RunFolder(settings.output_dir)
        self.step = self.total_steps = 0
        self.before: dict[str, float | None] = {}
        self._skipped = 0
        self._saved_step = 0
        self._peers = Peers()
        self._stop = StopRequest()
        self.writing = parallel.HeldFailure()
        self.seconds: list[float] = []
        self.loggers = Loggers([], step=0, warn=say)

    def __enter__(self) -> "FineTuning":
        try:
            self._build()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _build(self) -> None:
        settings = self.settings
        check_files(settings)
        device = parallel.usable_device(settings.device)
        self.device = parallel.start(device, settings.collective_timeout_seconds)
        check_compilation(settings)
        try_optimizer(settings.optimizer, torch.zeros(1, device=self.device))
        base_layout(settings)  # refuses a job of another size
        self._peers = Peers.meet(self.device)
        self.tokenizer = build_tokenizer(settings.tokenizer)
        model = build_on_meta(settings)
        open_weights(model, settings)  # refuses those of another model
        self._open_data(limit=model.max_seq_len, vocabulary=model.tok_embeddings.num_embeddings)
        self.total_steps = total_steps(
            self.data.size, self._global_batch, settings.epochs, settings.max_steps
        )
        self.identity = run_identity(settings, self.data, self.total_steps)
        torch.manual_seed(derive_seed(settings.seed, "start"))
        self.method = assemble(
            model,
            settings.method,
            total_steps=self.total_steps,
            device=self.device,
            split_generation=settings.split_generation,
        )
        self.optimizer = build_optimizer(settings.optimizer, self.method.parameters())
        self.scheduler = build_scheduler(settings.lr_scheduler, self.optimizer, self.total_steps)
        warn_of_no_effect(settings, self.total_steps, has_held_out=self.data.held_out is not None)
        self._open_run_folder()
        say(f"loading the base from {describe_files(settings)}")
        prepare_(model, settings, self.method.stack.leaf_parameters(), self.device)
        load_(model, settings, self.method.layers, self.device)
        self.model = model
        self.offloading = training.get_act_offloading_ctx_manager(
            model, settings.enable_activation_offloading
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.loggers.close()
        self.folder.close()
        if error is not None:
            self._explain(error)

    def _explain(self, error: BaseException) -> None:
        """Say of a collective that cannot end which process is missing, or why it has ended."""
        lost = self._peers.explain(error, f"after step {self.step} of {self.total_steps}")
        if lost is not None:
            raise lost from error
        if isinstance(error, PERSONS_MISTAKES):
            self._peers.tell(error)

    @property
    def _global_batch(self) -> int:
        settings = self.settings
        return settings.batch_size * settings.gradient_accumulation_steps * parallel.world_size()

    def _open_data(self, **model: int) -> None:
        settings = self.settings
        self.data = open_training_data(settings, self.tokenizer, **model)
        self.questions: Questions | None = None
        if settings.exact_match is not None:
            self.questions = Questions(self.tokenizer, **settings.exact_match)
            self.questions.refuse_unfit(**model)

    def _open_run_folder(self) -> None:
        settings = self.settings
        resume = settings.resume_from_checkpoint
        parallel.on_rank_zero(lambda: self.folder.start(resume=resume), self.device)
        if resume and has_checkpoints(self.folder.checkpoints):
            self._resume()
        elif resume:
            say(f"no checkpoint in {self.folder.checkpoints}; starting at step 0")
        parallel.agree(self.step, "the step to resume from", self.device)
        parallel.on_rank_zero(self._keep_rows_up_to_here, self.device)

    def _keep_rows_up_to_here(self) -> None:
        for rows in (self.folder.metrics, self.folder.diagnoses):
            rows.truncate_after(self.step)
        self.loggers = Loggers(self.settings.metric_loggers, step=self.step, warn=say)

    def _resume(self) -> None:
        step, state, reports = read_newest(self.folder.checkpoints)
        for line in reports:
            say(line)
        restore_(self, state, step)
        self.step = self._saved_step = step
        say(f"resuming {self.folder.path} from step {step} of {self.total_steps}")

    def train(self) -> None:
        """Run to the last step, evaluate before and after, write adapter and summary."""
        if self.step == 0 and not self.before:
            self.before = self.evaluate()
        with Reporter(self) as reporter, self._stop:
            while self.step < self.total_steps:
                reporter.add(self._train_step())
        self._finish()

    def _train_step(self) -> dict[str, Any]:
        started = time.perf_counter()
        lr = self.optimizer.param_groups[0]["lr"]
        report = self._optimize()
        self.scheduler.step()
        self.step += 1
        seconds = time.perf_counter() - started
        self.seconds.append(seconds)
        if self.settings.debug_rank_agreement:
            replicated = replicated_tensors(self.method, self.optimizer)
            refuse_disagreement(replicated, f"after step {self.step}")
        row = step_row(self.step, report, lr, seconds, peak_memory_mib(self.device))
        validates = self._every(self.settings.validate_every_n_steps) and not report.stop_requested
        if self.data.held_out is not None and validates:
            self.method.write_factors_()
            row["validation_loss"] = self._held_out_loss(self.data.held_out)
        if parallel.rank() == 0:
            self.writing.attempt(lambda: self.folder.metrics.append(row))
        self._count_skipped(report)
        # A skipped step waits for the next one, which tells whether the run can go on.
        settled = report.finite or self.step == self.total_steps
        if settled and (report.stop_requested or self._save_is_due()):
            self._save()
            self._stop_if(report.stop_requested)
        return row

    def _stop_if(self, requested: bool) -> None:
        if requested and self.step < self.total_steps:
            raise StoppedError(
                f"stopped by SIGTERM after step {self.step} of {self.total_steps}, which is saved; "
                "go on with resume_from_checkpoint=True."
            )

    def _optimize(self) -> StepReport:
        settings = self.settings
        rank, world = parallel.rank(), parallel.world_size()
        torch.manual_seed(derive_seed(settings.seed, "step", self.step, rank))
        batches = batch_positions(
            self.step,
            batch_size=settings.batch_size,
            accumulation=settings.gradient_accumulation_steps,
            world_size=world,
            rank=rank,
        )
        self.model.train()
        with self.method.step(self.optimizer, settings.clip_grad_norm, self._ends) as step:
            for positions in batches:
                samples = [self.data.order.at(position) for position in positions]
                batch = collate(samples, self.tokenizer.pad_id, self.device)
                step.backward(batch.loss_sum(self._logits(batch)), batch.label_count())
        return step.report

    def _ends(self) -> bool:
        """Whether the run is to stop; what could not be written is raised by the save."""
        return self._stop.requested or self.writing.failed

    def _logits(self, batch: Batch) -> Sequence[Tensor]:
        with self.offloading:
            return batch.logits(self.model)

    def _every(self, interval: int | None) -> bool:
        return interval is not None and self.step % interval == 0

    def _save_is_due(self) -> bool:
        """Whether this step ends an interval that has no checkpoint yet, or the run."""
        every = self.settings.save_every_n_steps
        return self.step == self.total_steps or self.step // every > self._saved_step // every

    def _count_skipped(self, report: StepReport) -> None:
        if report.finite:
            self._skipped = 0
            return
        self._skipped += 1
        say(f"step {self.step}: loss or gradient is not finite; the step was skipped")
        if self._skipped >= self.settings.max_skipped_steps:
            saved = has_checkpoints(self.folder.checkpoints)
            kept = f"the checkpoints in {self.folder.checkpoints} are" if saved else "no checkpoint"
            clipped = self.settings.clip_grad_norm is not None
            raise UserError(
                f"steps {self.step - self._skipped + 1} to {self.step} had no finite loss or "
                f"gradient (max_skipped_steps is {self._skipped}); {kept} "
                f"{'untouched' if saved else 'was saved before'}. Lower optimizer.lr"
                f"{'' if clipped else ', or set clip_grad_norm'}."
            )

    def _save(self) -> None:
        state = parallel.together(lambda: state_of(self), self.device)
        keep = self.settings.keep_checkpoints
        parallel.on_rank_zero(
            lambda: write_checkpoint(self.folder.checkpoints, self.step, state, keep=keep),
            self.device,
        )
        self._saved_step = self.step

    def evaluate(self) -> dict[str, float | None]:
        """Return held-out loss and exact match, as far as the settings name data for them."""
        self.method.write_factors_()
        figures: dict[str, float | None] = {}
        if self.data.held_out is not None:
            figures["loss"] = self._held_out_loss(self.data.held_out)
        if self.questions is not None:
            figures["exact_match"] = self.questions.exact_match(
                self.model, batch_size=self.settings.batch_size, device=self.device
            )
        return figures

    def _held_out_loss(self, data: Samples) -> float | None:
        return held_out_loss(
            self.model,
            data,
            batch_size=self.settings.batch_size,
            pad_id=self.tokenizer.pad_id,
            device=self.device,
        )

    def _finish(self) -> None:
        parallel.together(self.writing.release, self.device)
        after = self.evaluate()
        parallel.on_rank_zero(lambda: write_results(self, after), self.device)
