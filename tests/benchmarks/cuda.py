"""
Right or not, milliseconds and peak memory of training steps on an accelerator, in one command.

    python -m tests.benchmarks.cuda --seconds 240 [--tests] [--profile] [--only NAME ...]
        [--json FILE] [--device cpu --tiny]

Three steps alternate: a plain one, that of jdcore and that of TorchJD 0.18, if it is installed;
each from the forward pass to the ``.grad`` of all parameters, float32 products in full precision.
Medians are compared. Memory is the peak during a step above what is alive before it, without
``.grad``: of activations, gradients and temporaries. First comes
what says most; a case that fails or is out of time leaves the others alone. All networks are of
torch alone. ``--tests`` runs the tests that need a device first; ``--device cpu --tiny`` shows on
any machine that everything runs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, define, field
from torch import Tensor, nn
from torch.nn import functional as F

import jdcore
from jdcore.autogram import Engine
from jdcore.autojac import backward, gramian_backward, jac_to_grad, mtl_backward
from tests.benchmarks.autogram import group_norm, mlp, resnet18
from tests.benchmarks.networks import Bert, VisionTransformer

WARM_UP, REPETITIONS, SECONDS_PER_STEP = 2, 9, 4.0


@define
class Setting:
    """Where and how large."""

    device: torch.device
    tiny: bool

    def batch(self, size: int) -> int:
        return min(size, 4) if self.tiny else size

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@define
class Problem:
    """A model, its losses, and the modules that the Gramian is of."""

    model: nn.Module
    losses: Callable[[nn.Module], Tensor]
    shared: Callable[[nn.Module], Sequence[nn.Module]]
    batch_dim: int | None
    tolerance: float

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def clear(self) -> None:
        self.model.zero_grad()


Step = Callable[[], object]


@define
class Case:
    """
    Steps by name, plain first.

    :param check: Gives what is wrong, and by how much.
    :param clear: Takes the ``.grad`` of the last step away.
    :param tolerance: By how much it may be wrong.
    """

    steps: dict[str, Step]
    check: Callable[[], dict[str, float]]
    clear: Step
    tolerance: float


@define
class Result:
    """What is known of one case."""

    case: str
    errors: dict[str, float] = field(factory=dict)
    right: bool | None = None
    ms: dict[str, float] = field(factory=dict)
    mb: dict[str, float] = field(factory=dict)
    failures: dict[str, str] = field(factory=dict)


def gathered(parameters: Sequence[Tensor]) -> Tensor:
    fields = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.reshape(-1).double() for g in fields])


def rows_of(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """[m, n] in float64, one plain backward pass per loss."""
    rows = []
    for loss in losses.reshape(-1):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)
        ]
        rows.append(torch.cat([g.reshape(-1).double() for g in parts]))
    return torch.stack(rows)


def error_of(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


# -- autogram -------------------------------------------------------------------------------------


def autogram(problem: Problem) -> Case:
    """A plain step of the mean, ``Engine.backward``, and the two passes of TorchJD."""
    with torch.no_grad():
        example = problem.losses(problem.model)
    weights = torch.full_like(example, 1.0 / example.numel())
    engine = Engine(*problem.shared(problem.model), batch_dim=problem.batch_dim)

    def plain() -> None:
        problem.clear()
        problem.losses(problem.model).backward(weights)

    def ours() -> None:
        problem.clear()
        engine.backward(problem.losses(problem.model), lambda _: weights)

    def check() -> dict[str, float]:
        plain()
        expected = gathered(problem.parameters)
        ours()
        gradient = error_of(gathered(problem.parameters), expected)
        problem.clear()
        losses = problem.losses(problem.model)
        gramian = engine.compute_gramian(losses)
        few = min(3, len(losses))
        inside = [p for m in problem.shared(problem.model) for p in m.parameters()]
        rows = rows_of(losses[:few], inside)
        return {"G": error_of(gramian[:few, :few], rows @ rows.T), "gradient": gradient}

    steps: dict[str, Step] = {"plain": plain, "jdcore": ours}
    # The peer attaches hooks, which are not to hear the steps of the others.
    apart = copy.deepcopy(problem.model)

    def clear() -> None:
        problem.clear()
        apart.zero_grad()

    steps |= _peer_of(problem, apart, weights)
    return Case(steps, check, clear, problem.tolerance)


def _peer_of(problem: Problem, model: nn.Module, weights: Tensor) -> dict[str, Step]:
    try:
        from torchjd.autogram import Engine as PeerEngine
    except ImportError:
        return {}
    engine = PeerEngine(*problem.shared(model), batch_dim=problem.batch_dim)

    def theirs() -> None:
        model.zero_grad()
        losses = problem.losses(model)
        engine.compute_gramian(losses)
        losses.backward(weights)

    return {"torchjd": theirs}


def classifier(
    setting: Setting, model: nn.Module, x: Tensor, autocast: bool = False, tolerance: float = 1e-5
) -> Case:
    """One loss per sample."""
    device = setting.device
    x, y = x.to(device), torch.randint(10, (len(x),), device=device)

    def losses(model: nn.Module) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            outputs = model(x)
        return F.cross_entropy(outputs.float(), y, reduction="none")

    tolerance = 2e-2 if autocast else tolerance
    return autogram(Problem(model.to(device), losses, lambda model: [model], 0, tolerance))


def trunk(setting: Setting, body: nn.Module, x: Tensor, width: int, tasks: int) -> Case:
    """A mean over the batch per task, heads apart, the Gramian of the trunk."""
    heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))
    model = nn.ModuleDict({"trunk": body, "heads": heads}).to(setting.device)
    x, y = x.to(setting.device), torch.randn(tasks, len(x), 1, device=setting.device)

    def losses(model: Any) -> Tensor:
        hidden = model["trunk"](x).relu()
        pairs = zip(model["heads"], y, strict=True)
        return torch.stack([(head(hidden) - target).square().mean() for head, target in pairs])

    return autogram(Problem(model, losses, lambda model: [model["trunk"]], None, 1e-5))


# -- autojac --------------------------------------------------------------------------------------


def autojac(setting: Setting, body: nn.Module, x: Tensor, width: int, tasks: int) -> Case:
    """UPGrad from Jacobians and from Gramians, beside as many plain passes as there are losses."""
    heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))
    body, heads, x = body.to(setting.device), heads.to(setting.device), x.to(setting.device)
    y = torch.randn(tasks, len(x), 1, device=setting.device)
    shared, own = list(body.parameters()), list(heads.parameters())

    def clear() -> None:
        for p in [*shared, *own]:
            p.grad = None

    def forward() -> tuple[Tensor, list[Tensor]]:
        clear()
        hidden = body(x).relu()
        pairs = zip(heads, y, strict=True)
        return hidden, [(head(hidden) - target).square().mean() for head, target in pairs]

    def plain() -> None:
        _, losses = forward()
        for loss in losses:
            loss.backward(retain_graph=True)

    def gramian() -> None:
        gramian_backward(forward()[1], jdcore.get_weighting("upgrad"))

    def jacobian() -> None:
        backward(forward()[1])
        jac_to_grad([*shared, *own], jdcore.get_aggregator("upgrad"))

    def multitask() -> None:
        hidden, losses = forward()
        mtl_backward(losses, features=hidden)
        jac_to_grad(shared, jdcore.get_aggregator("upgrad"))

    def check() -> dict[str, float]:
        rows = rows_of(torch.stack(forward()[1]), [*shared, *own])
        weights = jdcore.get_weighting("upgrad")(rows @ rows.T)
        part = rows[:, : sum(p.numel() for p in shared)]
        expected = weights @ rows
        of_trunk = jdcore.get_weighting("upgrad")(part @ part.T) @ part
        errors = {}
        for name, step in (("gramian_backward", gramian), ("backward", jacobian)):
            step()
            errors[name] = error_of(gathered([*shared, *own]), expected)
        multitask()
        errors["mtl_backward"] = error_of(gathered(shared), of_trunk)
        return errors

    steps: dict[str, Step] = {"plain": plain, "gramian_backward": gramian}
    steps |= {"backward": jacobian, "mtl_backward": multitask}
    return Case(steps | _peers_of(forward, shared, own), check, clear, 1e-4)


def _peers_of(
    forward: Callable[[], tuple[Tensor, list[Tensor]]], shared: list[Tensor], own: list[Tensor]
) -> dict[str, Step]:
    try:
        from torchjd import autojac as peer
        from torchjd.aggregation import UPGrad
    except ImportError:
        return {}

    def jacobian() -> None:
        peer.backward(forward()[1])
        peer.jac_to_grad([*shared, *own], UPGrad())

    def multitask() -> None:
        hidden, losses = forward()
        peer.mtl_backward(losses, features=hidden)
        peer.jac_to_grad(shared, UPGrad())

    return {"torchjd backward": jacobian, "torchjd mtl": multitask}


# -- cases ----------------------------------------------------------------------------------------


def _images(setting: Setting, batch: int) -> Tensor:
    size = 8 if setting.tiny else 32
    return torch.randn(setting.batch(batch), 3, size, size)


def _resnet(setting: Setting, batch: int, autocast: bool = False) -> Case:
    return classifier(setting, resnet18(group_norm), _images(setting, batch), autocast)


def _vit(setting: Setting, batch: int, autocast: bool = False) -> Case:
    size = 32 if setting.tiny else 224
    model = VisionTransformer(32, 48, 2, 2) if setting.tiny else VisionTransformer()
    return classifier(setting, model, torch.randn(setting.batch(batch), 3, size, size), autocast)


def _bert(setting: Setting, batch: int, autocast: bool = False) -> Case:
    model = Bert(100, 32, 2, 2) if setting.tiny else Bert()
    length, vocabulary = (8, 100) if setting.tiny else (128, 30522)
    tokens = torch.randint(vocabulary, (setting.batch(batch), length))
    return classifier(setting, model, tokens, autocast)


def _mlp(setting: Setting, batch: int) -> Case:
    width = 32 if setting.tiny else 512
    x = torch.randn(setting.batch(batch), width)
    return classifier(setting, mlp(width, width, width, width, 10), x)


Maker = Callable[[Setting, nn.Module, Tensor, int, int], Case]


def _on_mlp(make: Maker, setting: Setting, tasks: int) -> Case:
    width = 32 if setting.tiny else 4096
    x = torch.randn(setting.batch(64), width)
    return make(setting, mlp(width, width, width), x, width, tasks)


def _on_resnet(make: Maker, setting: Setting, tasks: int) -> Case:
    return make(setting, resnet18(group_norm, None), _images(setting, 64), 512, tasks)


# What says most comes first, should time be short.
CASES: dict[str, Callable[[Setting], Case]] = {
    "resnet18gn_64": lambda s: _resnet(s, 64),
    "vit_s_32": lambda s: _vit(s, 32),
    "bert_base_16": lambda s: _bert(s, 16),
    "mlp_64": lambda s: _mlp(s, 64),
    "bert_base_16_bf16": lambda s: _bert(s, 16, True),
    "resnet18gn_64_bf16": lambda s: _resnet(s, 64, True),
    "vit_s_32_bf16": lambda s: _vit(s, 32, True),
    "resnet18gn_256": lambda s: _resnet(s, 256),
    "trunk_mlp_16": lambda s: _on_mlp(trunk, s, 16),
    "autojac_mlp_2": lambda s: _on_mlp(autojac, s, 2),
    "autojac_resnet_8": lambda s: _on_resnet(autojac, s, 8),
    "mlp_512": lambda s: _mlp(s, 512),
    "autojac_mlp_8": lambda s: _on_mlp(autojac, s, 8),
    "autojac_resnet_2": lambda s: _on_resnet(autojac, s, 2),
    "trunk_resnet_16": lambda s: _on_resnet(trunk, s, 16),
}


# -- measuring ------------------------------------------------------------------------------------


class OutOfTime(BaseException):  # like KeyboardInterrupt: no step is to catch it
    """A case took longer than it may."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stops what hangs, so that the next case has its turn."""

    def stop(*_: object) -> None:
        raise OutOfTime(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(result: Result, setting: Setting) -> None:
    """One case; what is known so far stays in the result, should the rest fail."""
    torch.manual_seed(0)
    case = CASES[result.case](setting)
    try:
        result.errors = case.check()
        result.right = all(error <= case.tolerance for error in result.errors.values())
    except Exception as failure:
        result.failures["check"] = _told(failure)
    setting.free()
    for key, step in list(case.steps.items()):
        try:
            for _ in range(WARM_UP):
                step()
            case.clear()
            setting.free()
            result.mb[key] = _peak(step, setting)
        except Exception as failure:
            result.failures[key] = _told(failure)
            del case.steps[key]
    times: dict[str, list[float]] = {key: [] for key in case.steps}
    try:
        for steps in _apart(case.steps):
            _alternate(steps, times, setting)
    finally:
        result.ms = {key: statistics.median(values) for key, values in times.items() if values}


def _told(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {str(failure)[:300]}"


def _peak(step: Step, setting: Setting) -> float:
    setting.synchronize()
    setting.forget_peak()
    before = setting.allocated()
    step()
    setting.synchronize()
    return (setting.peak() - before) / 1e6


def _apart(steps: dict[str, Step]) -> Iterator[dict[str, Step]]:
    """The steps of each library by themselves, each beside the plain one."""
    # The peer makes hooks in every step: jdcore would look each time whether they are on its graph,
    # which nobody pays who uses one of the two.
    theirs = {key: step for key, step in steps.items() if key.startswith("torchjd")}
    yield {key: step for key, step in steps.items() if key not in theirs}
    if theirs:
        yield {key: step for key, step in steps.items() if key in theirs or key == "plain"}


def _alternate(steps: dict[str, Step], times: dict[str, list[float]], setting: Setting) -> None:
    for _ in range(REPETITIONS):
        for key, step in steps.items():
            if sum(times[key]) > 1e3 * SECONDS_PER_STEP:
                continue
            setting.synchronize()
            start = time.perf_counter()
            step()
            setting.synchronize()
            times[key].append(1e3 * (time.perf_counter() - start))


def profiled(name: str, setting: Setting) -> str:
    """The kernels that take most of the step of jdcore."""
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    step = list(CASES[name](setting).steps.values())[1]
    for _ in range(WARM_UP):
        step()
    kinds = [ProfilerActivity.CPU]
    if setting.device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as record:
        step()
        setting.synchronize()
    order = "self_device_time_total" if len(kinds) > 1 else "self_cpu_time_total"
    return record.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60)


def _print_profile(name: str, setting: Setting) -> None:
    try:
        with at_most(10):
            print(profiled(name, setting), flush=True)
    except (Exception, OutOfTime) as failure:
        print(f"    no profile: {_told(failure)}", flush=True)


def line(result: Result) -> str:
    """One line for each step, beside the plain one."""
    word = {True: "right", False: "WRONG", None: "unchecked"}[result.right]
    errors = ", ".join(f"{key} {value:.1e}" for key, value in result.errors.items())
    lines = [f"{result.case}: {word} ({errors})"]
    plain, memory = result.ms.get("plain", 0.0), result.mb.get("plain", 0.0)
    for key, ms in result.ms.items():
        mb = result.mb[key]
        ratios = f"{ms / plain:5.2f}" if plain else "    -"
        ratios += f"   {mb:8.0f} MB {mb / memory:5.2f}" if memory else ""
        lines.append(f"    {key:18} {ms:9.2f} ms {ratios}")
    lines += [f"    {key:18} failed: {why}" for key, why in result.failures.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="for all cases together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a look at the script")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tests", action="store_true", help="first run the tests that need CUDA")
    parser.add_argument("--profile", action="store_true", help="name the longest kernels")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    if arguments.tests:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests"]
        subprocess.run(command, check=False, timeout=arguments.seconds / 2)
    setting = Setting(torch.device(arguments.device), arguments.tiny)
    # Both are defaults of some versions; errors are to be those of the methods.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if setting.device.type == "cpu":
        torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if setting.device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}; times in ms, ratios to the plain step", flush=True)
    results: list[Result] = []
    for name in arguments.only:
        left = end - time.monotonic()
        if left < 5:
            print(f"{name}: no time left", flush=True)
            continue
        _run_within(name, setting, min(left - 1, 0.4 * arguments.seconds), results)
        if arguments.profile and end - time.monotonic() > 10:
            _print_profile(name, setting)
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(r) for r in results], indent=1))
    if wrong := [result.case for result in results if result.right is False]:
        sys.exit(f"wrong: {', '.join(wrong)}")


def _run_within(name: str, setting: Setting, seconds: float, results: list[Result]) -> None:
    result = Result(name)
    results.append(result)
    try:
        with at_most(seconds):
            run(result, setting)
    except (Exception, OutOfTime) as failure:
        result.failures["case"] = _told(failure)
    print(line(result), flush=True)
    setting.free()


if __name__ == "__main__":
    main()
