"""The module that trains a user's model against an NPU."""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from npu_wire.errors import DeviceFault, InvalidInput, NotCalibrated
from npu_wire.layer_map import Float32Array, LayerMap
from npu_wire.quantize import dequantize, quantize
from trainer_client.npu.session import Npu, PendingBatch, Session
from trainer_client.qat.calibrate import CalibrationData, Range, RangeRule, observe, require_batch
from trainer_client.qat.capture import Captured, capture
from trainer_client.qat.checkpoint import take_ranges, to_tensors
from trainer_client.qat.fold import fold_batch_norm
from trainer_client.qat.inject import inject, rule_of_layer, rule_of_tensor
from trainer_client.qat.liveness import Structure
from trainer_client.qat.monitor import SaturationMonitor
from trainer_client.qat.noise import LayerNoise, NoiseReport
from trainer_client.qat.taps import TappedGraph, tap
from trainer_client.qat.trace import Fp32Timing, Trace
from trainer_client.qat.weights import PushedWeights

log = logging.getLogger(__name__)


def prepare(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    npu: Npu,
    *,
    trace: Trace | None = None,
    ranges: Mapping[str, Range] | None = None,
) -> "QatModule":
    """Puts a model in the loop with an NPU.

    Args:
        model: maps one float32 tensor (batch, ...) to one float32 tensor (batch, ...). It stays the object
            that is
            trained: its parameters are the ones that the optimizer changes.
        example_inputs: one batch, to capture the model with; shape (n, ...), n >= 1.
        npu: what `trainer_client.connect` returns.
        trace: collects the times of every training batch.
        ranges: activation ranges by value name, of an earlier `calibrate`; without them call `calibrate`
            next.

    Raises:
        InvalidInput, UnsupportedModel: see `trainer_client.qat.capture.capture` and `Npu.compile`.
    """
    return QatModule(capture(model, example_inputs), npu, trace=trace, ranges=ranges)


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
    ) -> None:
        super().__init__()
        self.model = captured.model
        self._captured = captured
        self._structure = Structure(captured.model)
        self._owners = captured.modules
        self._folded = fold_batch_norm(captured.graph.graph)
        self._npu = npu
        self._trace = trace
        self._ranges: dict[str, Range] = {}
        self._compiled: _Compiled | None = None
        self._range_rule = RangeRule()
        self._batches = 0
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
            data: one batch (float32, shape (n, ...)), or an iterable of batches or of (batch, label, ...)
                tuples. Some hundred samples of the training data do.
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
        return self._require_compiled().session.layer_map

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

    # Between the layers it talks to the NPU: torch.compile leaves it alone and compiles what is around it.
    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason="the forward of a QatModule is the NPU's, layer by layer"
    )
    def forward(self, x: Tensor) -> Tensor:
        """Runs a batch.

        Args:
            x: float32, shape (n, ...) as captured, finite. In training mode n is at most the NPU's largest
                batch.

        Returns:
            float32, shape (n, ...): in training mode with a gradient to the parameters; the value is the
            NPU's.

        Raises:
            NotCalibrated: `calibrate` has not been called.
            InvalidInput: a shape or dtype that was not compiled, or a batch that is too large.
            NonFiniteInput: NaN or infinity in x, or in the weights as the NPU folds them. The step can be
                repeated once they are repaired; so after any other refusal of weights.
            Timeout, ServerUnavailable, SessionLost, DeviceFault: see `npu_wire.errors`.
        """
        self._structure.require_unchanged()
        compiled = self._require_compiled()
        require_batch(self._captured, x, "the input")
        try:
            return self._train_forward(compiled, x) if self.training else self._eval_forward(compiled, x)
        except BaseException:
            compiled.forget_pushed()
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
            self._compiled.session.close()
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

    def _train_forward(self, compiled: "_Compiled", x: Tensor) -> Tensor:
        largest = self._npu.info.max_batch
        if x.shape[0] > largest:
            raise InvalidInput(
                f"the batch holds {x.shape[0]} samples, more than the NPU takes in training mode "
                f"({largest}); use smaller batches and accumulate gradients"
            )
        run = compiled.submit(self._captured, x)
        output = compiled.tapped.module(run, run.inject_input(x))
        assert isinstance(output, Tensor)
        tapped = compiled.tapped
        self._last_noise = NoiseReport(1, run.noise, len(tapped.taps), len(tapped.missing), self._owners)
        self._total_noise = self._total_noise + self._last_noise
        compiled.monitor.add(run.noise)
        self._batches += 1
        if self._trace is not None:
            names = [layer.name for layer in compiled.session.layer_map.layers]
            self._trace.add_batch(self._batches, names, run.pending.timings(), run.timings)
        return output

    def _eval_forward(self, compiled: "_Compiled", x: Tensor) -> Tensor:
        layer_map = compiled.session.layer_map
        (last,) = layer_map.output_layers
        spec = layer_map.layers[last].output
        largest = self._npu.info.max_batch  # asked first: it refuses a forked process
        compiled.push()
        outputs = []
        for start in range(0, x.shape[0], largest):
            codes = layer_map.named(compiled.quantize_input(x[start : start + largest]))
            pending = compiled.session.submit(codes, ())
            outputs.append(dequantize(pending.tensor(last), spec.scale, spec.zero_point))
        output = torch.from_numpy(np.concatenate(outputs)).reshape(-1, *self._captured.output_shape)
        return output.to(x.device)

    def _require_compiled(self) -> "_Compiled":
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
        session = self._npu.compile(self._captured.onnx, self._ranges)
        try:
            tapped = tap(self._folded, session.layer_map)
            if not tapped.taps:
                raise DeviceFault(
                    f"none of the layers that the NPU reports ({', '.join(tapped.missing)}) is a value of "
                    "the model; this backend does not keep the names of the ONNX values"
                )
        except BaseException:
            session.close()
            raise
        if tapped.missing and tapped.missing != self._warned_of:
            self._warned_of = tapped.missing
            log.warning(
                "%d of the NPU's %d layers have no value in the FP32 graph and add no noise there: %s",
                len(tapped.missing),
                len(session.layer_map.layers),
                ", ".join(tapped.missing),
            )
        monitor = SaturationMonitor(self._owners)
        self._compiled = _Compiled(session, tapped, PushedWeights(self._captured), monitor)


class _Compiled:
    """A session on the NPU with the training graph that fits it."""

    def __init__(
        self, session: Session, tapped: TappedGraph, weights: PushedWeights, monitor: SaturationMonitor
    ) -> None:
        self.session = session
        self.tapped = tapped
        self.monitor = monitor
        self._weights = weights

    def push(self) -> None:
        """Sends the weights that changed."""
        self._weights.push_changes(self.session)

    def forget_pushed(self) -> None:
        """After an error: the next batch sends all weights."""
        self._weights.forget()

    def quantize_input(self, x: Tensor) -> Any:
        """INT8 codes of a batch."""
        (spec,) = self.session.layer_map.quantized_inputs
        values: Float32Array = x.detach().cpu().numpy()
        return quantize(values, spec.scale, spec.zero_point).reshape(x.shape[0], *spec.shape)

    def submit(self, captured: Captured, x: Tensor) -> "_Run":
        """Starts the NPU on a batch, with the weights of now."""
        codes = self.quantize_input(x)
        self.push()
        layer_map = self.session.layer_map
        pending = self.session.submit(layer_map.named(codes), self.tapped.taps)
        return _Run(captured, layer_map, codes, pending)


class _Run:
    """One training forward: the `TapContext` of a batch."""

    def __init__(self, captured: Captured, layer_map: LayerMap, codes: Any, pending: PendingBatch) -> None:
        self.pending = pending
        self.noise: dict[str, LayerNoise] = {}
        self.timings: list[Fp32Timing] = []
        self._captured = captured
        self._layer_map = layer_map
        self._codes = codes
        self._mark_ns = time.monotonic_ns()

    def parameter(self, name: str) -> Tensor:
        """The live parameter, buffer or constant of that name."""
        return self._captured.tensor(name)

    def inject_input(self, x: Tensor) -> Tensor:
        """The input as the NPU sees it, images channels-last; the FP32 layers keep that order.

        It is the faster order on a CPU, and the same for every NPU: FP32 rounding depends on it, and training
        against two NPUs of equal bits must give equal weights. Codes in another order are brought to it.
        """
        (spec,) = self._layer_map.quantized_inputs
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        value, self.noise[spec.name] = inject(x, self._codes, rule_of_tensor(spec))
        self._mark_ns = time.monotonic_ns()
        return value

    def inject(self, value: Tensor, layer: int, lower: float, upper: float, overwrite: bool) -> Tensor:
        """Waits for the NPU's tensor of a layer and puts it in the place of the FP32 value."""
        start_ns, end_ns = self._mark_ns, time.monotonic_ns()
        codes = self.pending.tensor(layer)
        tensor_ns = time.monotonic_ns()
        spec = self._layer_map.layers[layer]
        injected, self.noise[spec.name] = inject(value, codes, rule_of_layer(spec, lower, upper), overwrite)
        self._mark_ns = time.monotonic_ns()
        self.timings.append(Fp32Timing(layer, start_ns, end_ns, tensor_ns, self._mark_ns))
        return injected
