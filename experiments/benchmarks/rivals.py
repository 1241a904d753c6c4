"""The convolutions that PyTorch runs, each where it is installed: FFTs, FlashFFTConv and cuDNN's causal convolution."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.cases import Case, Inputs
from experiments.benchmarks.implementations import Prepared
from pallas_kernels.timing import Round, host_round

RIVALS = ("torch_real", "torch_complex", "flashfftconv", "cudnn")
CUDA_ONLY = ("flashfftconv", "cudnn")

_MODULES = {
    "torch_real": ("torch",),
    "torch_complex": ("torch",),
    "flashfftconv": ("torch", "flashfftconv"),
    "cudnn": ("torch", "cudnn"),
}


def missing(name: str) -> str | None:
    """The module that a rival lacks on this machine."""
    return next((module for module in _MODULES[name] if importlib.util.find_spec(module) is None), None)


def prepare(name: str, case: Case, sets: Sequence[Inputs], *, cuda: bool) -> Prepared:
    """Makes a rival ready for a case, on tensors that share the memory of the inputs.

    Raises:
      NotImplementedError: if it does not support the case.
    """
    torch = importlib.import_module("torch")
    convolution = _make(name, torch, case)
    tensor_sets = [{key: torch.from_dlpack(x) for key, x in inputs.items()} for inputs in sets]
    backward = case.direction == "forward+backward"
    for tensors in tensor_sets:
        for argument in case.arguments:
            tensors[argument].requires_grad_(backward)

    def call(tensors: dict[str, Any]) -> dict[str, Any]:
        arguments = [tensors[argument] for argument in case.arguments]
        if not backward:
            with torch.no_grad():
                return {"y": convolution(*arguments)}
        y = convolution(*arguments)
        gradients = torch.autograd.grad(y, arguments, tensors["cotangent"])
        return {"y": y.detach()} | dict(zip(case.arguments, gradients, strict=True))

    def results() -> dict[str, np.ndarray]:
        f = torch.as_tensor(case.sampled_features, device=tensor_sets[0]["u"].device)
        return {key: x.index_select(-2, f).double().cpu().numpy() for key, x in call(tensor_sets[0]).items()}

    if not cuda:
        return Prepared(host_round(call, tensor_sets, lambda result: result), results, None)
    return Prepared(_event_round(torch, call, tensor_sets), results, _temporary_bytes(torch, call, tensor_sets[0]))


def release() -> None:
    """Gives what PyTorch keeps back to the device."""
    if importlib.util.find_spec("torch") is not None:
        torch = importlib.import_module("torch")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _make(name: str, torch: Any, case: Case) -> Callable[..., Any]:
    n = case.length if case.protocol == "circular" else 2 * case.length
    if name == "flashfftconv":
        if case.dtype == "float32":
            raise NotImplementedError("FlashFFTConv takes float16 and bfloat16.")
        flash = importlib.import_module("flashfftconv").FlashFFTConv(n, dtype=getattr(torch, case.dtype)).cuda()
        return lambda u, kernel, *gates: flash(u, kernel, **dict(zip(("pregate", "postgate"), gates, strict=False)))
    if name == "cudnn":
        if case.protocol == "circular":
            raise NotImplementedError("cuDNN's convolution is causal.")
        ops = importlib.import_module("cudnn.ops")
        return _gated(lambda u, kernel: ops.fft_causal_conv1d(u, kernel.to(u.dtype)))
    fft = torch.fft

    def real(u: Any, kernel: Any) -> Any:
        return fft.irfft(fft.rfft(u.float(), n=n) * fft.rfft(kernel, n=n), n=n)[..., : case.length].to(u.dtype)

    def full(u: Any, kernel: Any) -> Any:
        return fft.ifft(fft.fft(u.float(), n=n) * fft.fft(kernel, n=n), n=n).real[..., : case.length].to(u.dtype)

    return _gated(real if name == "torch_real" else full)


def _gated(convolution: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def run(u: Any, kernel: Any, pre_gate: Any = None, post_gate: Any = None) -> Any:
        y = convolution(u if pre_gate is None else u * pre_gate, kernel)
        return y if post_gate is None else y * post_gate

    return run


def _event_round(torch: Any, call: Callable[[Any], Any], sets: Sequence[Any]) -> Round:
    """A round between two events on the device."""

    def run(calls: int) -> float:
        call(sets[0])
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for which in range(calls):
            call(sets[which % len(sets)])
        stop.record()
        stop.synchronize()
        return 1e-3 * start.elapsed_time(stop)

    return run


def _temporary_bytes(torch: Any, call: Callable[[Any], Any], tensors: dict[str, Any]) -> int:
    """The peak of PyTorch's allocator over a call, less what the call returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    returned = call(tensors)
    torch.cuda.synchronize()
    outputs = sum(x.numel() * x.element_size() for x in returned.values())
    return int(torch.cuda.max_memory_allocated() - before - outputs)
