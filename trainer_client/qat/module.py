"""The module that trains a user's model against an NPU."""

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

from npu_wire.allocator import return_free_memory
from npu_wire.errors import InvalidInput, NotCalibrated
from npu_wire.host_share import HostShare, host_share
from npu_wire.layer_map import LayerMap
from trainer_client.npu.session import Npu
from trainer_client.qat.calibrate import CalibrationData, Range, RangeRule, observe
from trainer_client.qat.capture import Captured, Example, capture
from trainer_client.qat.checkpoint import take_ranges, to_tensors
from trainer_client.qat.compiled import Compiled, compile_for
from trainer_client.qat.early_push import EarlyPush
from trainer_client.qat.evaluation import evaluate
from trainer_client.qat.fold import fold_batch_norm
from trainer_client.qat.lean_pass import LeanPass
from trainer_client.qat.liveness import Structure
from trainer_client.qat.machine import fit_machine
from trainer_client.qat.monitor import SaturationMonitor
from trainer_client.qat.noise import NoiseReport
from trainer_client.qat.signature import Call
from trainer_client.qat.summary import summary
from trainer_client.qat.trace import Trace
from trainer_client.qat.training_pass import TrainingPass

log = logging.getLogger(__name__)

Fp32Pass = Literal["always", "where_needed"]
FP32_PASSES: tuple[Fp32Pass, ...] = get_args(Fp32Pass)


def prepare(
    model: nn.Module,
    example_inputs: Example,
    npu: Npu,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    trace: Trace | None = None,
    ranges: Mapping[str, Range] | None = None,
    fp32_pass: Fp32Pass = "always",
    full_pass_every: int = 100,
) -> "QatModule":
    """Puts a model in the loop with an NPU.

    Args:
        model: any signature and return value that `torch.export` knows: several tensors, tuples, dicts,
            dataclasses, keywords, integers and booleans, a loss among the outputs. It stays the object that
            is trained: its parameters are the ones that the optimizer changes.
        example_inputs: one batch, to capture the model with: a tensor, a tuple of positional arguments, or a
            dict of keyword arguments. Tensors that begin with the batch begin with one size, n >= 1. What is
            no tensor is a constant of the captured network.
        example_kwargs: keyword arguments beside positional ones.
        npu: what `trainer_client.connect` returns.
        trace: collects the times of every training batch.
        ranges: activation ranges by value name, of an earlier `calibrate`; without them call `calibrate`
            next.
        fp32_pass: "always" computes every layer in FP32 beside the NPU, which measures the noise of every
            layer in every step. "where_needed" takes the NPU's tensors as they are, keeps their codes and
            runs the FP32 layers' backward passes only; where the NPU's registers may overflow it computes the
            layer as well, to know where a gradient would mislead. Faster, and a fraction of the memory.
        full_pass_every: of "where_needed": every so many steps, from the first on, all layers are computed in
            FP32 to measure the noise, which changes no gradient; 0: never.

    Raises:
        InvalidInput, UnsupportedModel: see `trainer_client.qat.capture.capture` and `Npu.compile`.
    """
    captured = capture(model, example_inputs, example_kwargs)
    return QatModule(
        captured, npu, trace=trace, ranges=ranges, fp32_pass=fp32_pass, full_pass_every=full_pass_every
    )


class QatModule(nn.Module):
    """A user's model, computed by an NPU.

    In training mode the forward pass runs in FP32 with every layer's value replaced by what the NPU computed
    for the same batch and the same weights; the gradient is the FP32 layer's. In evaluation mode the NPU
    computes alone, and its output is returned. Batch norm always uses its running statistics (folded into the
    convolution, as on the NPU; weight, gamma and beta train) and dropout does nothing.

    Attributes:
        model: the user's own model.
        accepts_loss_kwargs: for Hugging Face's Trainer, which adds arguments to what it takes for `**kwargs`.
    """

    accepts_loss_kwargs = False

    def __init__(
        self,
        captured: Captured,
        npu: Npu,
        *,
        trace: Trace | None = None,
        ranges: Mapping[str, Range] | None = None,
        fp32_pass: Fp32Pass = "always",
        full_pass_every: int = 100,
    ) -> None:
        super().__init__()
        if fp32_pass not in FP32_PASSES:
            raise InvalidInput(f"fp32_pass is {fp32_pass!r}; legal: {', '.join(FP32_PASSES)}")
        if full_pass_every < 0:
            raise InvalidInput(f"full_pass_every is {full_pass_every}; legal: 0 (never) or a number of steps")
        fit_machine(npu)
        self._lean = fp32_pass == "where_needed"
        self._full_pass_every = full_pass_every
        self.model = captured.model
        self._captured = captured
        self._structure = Structure(captured.model)
        self._owners = captured.modules
        self._folded = fold_batch_norm(captured.graph.graph)
        self._npu = npu
        self._trace = trace
        self._ranges: dict[str, Range] = {}
        self._compiled: Compiled | None = None
        self._early_push = EarlyPush(captured.model, self._push_early)
        self._range_rule = RangeRule()
        self._batches = 0
        self._monitor = SaturationMonitor(self._owners)
        self._warned_of: tuple[str, ...] = ()
        self.reset_noise()
        if ranges is not None:
            self._ranges = dict(ranges)
            self._compile()

    def calibrate(
        self,
        data: CalibrationData,
        *,
        method: str = "minmax",
        percentile: float = 99.9,
        momentum: float = 0.1,
        max_batches: int | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    ) -> "QatModule":
        """Measures the activation ranges of the FP32 model and compiles the model for the NPU.

        Args:
            data: one batch (a tensor), or an iterable of batches as a loader yields them: tensors, tuples of
                the model's inputs (labels may follow), or dicts of its keywords. Some hundred samples of the
                training data do.
            method: "minmax", "percentile" or "ema"; see `trainer_client.qat.calibrate.RangeRule`.
            percentile: of the method "percentile".
            momentum: of the method "ema".
            max_batches: stop after so many batches; None: take all.
            progress: wraps the iterable and shows how far it is, as `tqdm.tqdm` and `rich.progress.track` do.

        Raises:
            InvalidInput, NonFiniteInput: see `trainer_client.qat.calibrate.observe`.
            UnsupportedModel: the NPU refuses the model; the message names node, operator and reason.
        """
        self._range_rule = RangeRule(method, percentile, momentum)
        return self.recalibrate(data, max_batches=max_batches, progress=progress)

    def recalibrate(
        self,
        data: CalibrationData,
        *,
        max_batches: int | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    ) -> "QatModule":
        """Measures the ranges again, with the weights of now and the method of the last `calibrate`.

        Args:
            data: as in `calibrate`.
            max_batches: as in `calibrate`.
            progress: as in `calibrate`.

        Raises:
            NpuError: as `calibrate`.
        """
        batches: Iterable[Any] = [data] if isinstance(data, Tensor) else data
        shown = batches if progress is None else progress(batches)
        self._ranges = observe(self._captured, itertools.islice(shown, max_batches), self._range_rule)
        self._compile()
        return self

    @property
    def ranges(self) -> Mapping[str, Range]:
        """Activation ranges by ONNX value name; empty before `calibrate`."""
        return dict(self._ranges)

    @property
    def layer_map(self) -> LayerMap:
        """Every INT8 tensor of the compiled model.

        Raises:
            NotCalibrated: the model is not compiled yet.
        """
        return self._require_compiled().layer_map

    @property
    def host_share(self) -> HostShare:
        """How much of the model the NPU's host computes, where bits are the runtime's, not the chip's."""
        return host_share(self.layer_map)

    @property
    def noise(self) -> NoiseReport:
        """Noise of the last training forward; `print` shows it as a table."""
        return self._last_noise

    @property
    def total_noise(self) -> NoiseReport:
        """Noise of all training forwards since the start or `reset_noise`."""
        return self._total_noise

    def reset_noise(self) -> None:
        """Begins a new noise report."""
        self._last_noise = self._total_noise = NoiseReport()

    def __str__(self) -> str:
        """Which layers the NPU computes and which its host, and why; `repr` is the tree of modules."""
        layer_map = self._compiled.layer_map if self._compiled else None
        return summary(type(self.model).__name__, self._npu.info, layer_map)

    # Between the layers it talks to the NPU: torch.compile leaves it alone and compiles what is around it.
    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason="the forward of a QatModule is the NPU's, layer by layer"
    )
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a batch.

        Args:
            args: as the model takes them and as they were captured; a batch of n samples, in training mode at
                most as many as the NPU's largest batch. What the NPU quantizes must be finite.
            kwargs: the same.

        Returns:
            What the model returns, its values those of the NPU: in training mode with a gradient to the
            parameters, in evaluation mode without one. What the NPU does not compute (a loss, say) follows
            from its values in FP32, in both modes by the same operations: their results are equal.

        Raises:
            NotCalibrated: `calibrate` has not been called.
            InvalidInput: arguments that were not captured, or a batch that is too large.
            NonFiniteInput: NaN or infinity in an input, or in the weights as the NPU folds them. The step can
                be repeated once they are repaired; so after any other refusal of weights.
            Timeout, ServerUnavailable, SessionLost, DeviceFault: see `npu_wire.errors`.
        """
        self._structure.require_unchanged()
        compiled = self._require_compiled()
        call = self._captured.signature.flatten(args, kwargs)
        try:
            run = self._train if self.training else self._evaluate
            return self._captured.returned(run(compiled, call))
        except BaseException:
            compiled.weights.forget()
            raise

    def train(self, mode: bool = True) -> "QatModule":
        """Chooses the training mode, see `forward`; batch norm and dropout are the same in both modes.

        The NPU holds batch norm as constants in the convolution before it. Statistics of the batch at hand
        would be another network than the chip's, so the running ones are used and never updated, while gamma
        and beta train. Dropout does nothing. There is no argument to change that: to adapt the statistics,
        run the FP32 model (`qat.model`) in training mode over some data, then `recalibrate`.

        Args:
            mode: True for training, False for evaluation.
        """
        super().train(mode)
        return self

    def close(self) -> None:
        """Releases the session on the NPU; idempotent. The model and its weights stay."""
        if self._compiled is not None:
            self._compiled.close()
            self._compiled = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Adds the activation ranges, which a checkpoint needs beside the weights, as tensors."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in to_tensors(self._ranges, self._npu.info).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes over a checkpoint's ranges; the next forward compiles with them if they differ."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        ranges, keys = take_ranges(state_dict, prefix, self._npu.info)
        unexpected_keys[:] = [key for key in unexpected_keys if key not in keys]
        if ranges is None:
            missing_keys.append(f"{prefix}npu.*")
        elif ranges != self._ranges:
            self.close()
            self._ranges = ranges

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a QatModule holds a session on an NPU and cannot be copied or pickled; save qat.state_dict() "
            "(or model.state_dict()), or copy the model and call prepare() on the copy"
        )

    def _train(self, compiled: Compiled, call: Call) -> Sequence[Any]:
        largest = self._npu.info.max_batch
        if call.samples > largest:
            raise InvalidInput(
                f"the batch holds {call.samples} samples, more than the NPU takes in training mode "
                f"({largest}); use smaller batches and accumulate gradients"
            )
        run = LeanPass(compiled, call, self._is_full()) if self._lean else TrainingPass(compiled, call)
        self._early_push.forward_begins()
        outputs = run.outputs()
        tapped = compiled.tapped
        self._last_noise = NoiseReport(1, run.noise, len(tapped.taps), len(tapped.missing), self._owners)
        self._total_noise = self._total_noise + self._last_noise
        self._monitor.add(run.noise)
        self._batches += 1
        if self._trace is not None:
            names = [layer.name for layer in compiled.layer_map.layers]
            self._trace.add_batch(self._batches, names, run.pending.timings(), run.timings)
        return outputs

    def _is_full(self) -> bool:
        """Whether all noise is measured; a pass without a gradient has no other purpose."""
        due = self._full_pass_every > 0 and self._batches % self._full_pass_every == 0
        return due or not torch.is_grad_enabled()

    def _push_early(self) -> None:
        if self._compiled is not None:
            self._compiled.push_early()

    def _evaluate(self, compiled: Compiled, call: Call) -> Sequence[Any]:
        return evaluate(compiled, call, self._npu.info.max_batch)

    def _require_compiled(self) -> Compiled:
        if self._compiled is None:
            if not self._ranges:
                raise NotCalibrated(
                    "the activation ranges are unknown; call qat.calibrate(loader) with some hundred "
                    "samples, or load a checkpoint of qat.state_dict()"
                )
            self._compile()
        assert self._compiled is not None
        return self._compiled

    def _compile(self) -> None:
        self.close()
        self._compiled = compiled = compile_for(
            self._npu, self._captured, self._folded, self._ranges, self._lean
        )
        self._monitor = SaturationMonitor(self._owners)
        return_free_memory()  # capturing takes a multiple of what stays
        missing = compiled.tapped.missing
        if missing and missing != self._warned_of:
            self._warned_of = missing
            log.warning(
                "%d of the NPU's %d layers have no value in the FP32 graph and add no noise there: %s",
                len(missing),
                len(compiled.layer_map.layers),
                ", ".join(missing),
            )
