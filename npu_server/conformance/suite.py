"""Runs the suite: operators and contract in the process, the same over gRPC, and both compared."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from npu_server.app import serve
from npu_server.config import ServeConfig
from npu_server.conformance.cases import all_cases, probe_candidates
from npu_server.conformance.contract import Check, contract_checks
from npu_server.conformance.graphs import codes, range_variants
from npu_server.conformance.in_process import in_process_checks
from npu_server.conformance.judges import Judge, choose_judge
from npu_server.conformance.operators import try_operators
from npu_server.conformance.probe import Broken, Probe, make_probe
from npu_server.conformance.report import CheckResult, OperatorResult, Report, Verdict
from npu_server.conformance.targets import LocalTarget, Target
from npu_server.conformance.trials import Trial, attempt
from npu_server.conformance.wire import RemoteTarget
from npu_server.seam import Backend
from npu_wire.device import Capabilities
from npu_wire.errors import InvalidInput

Connect = Callable[[str], RemoteTarget]
"""Endpoint -> what talks to it."""

_NEEDS_DETERMINISM = ("determinism", "weights", "lifecycle", "iteration")


@dataclass
class _Findings:
    """What has been found so far."""

    judge: Judge | None = None
    operators: list[OperatorResult] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    checks: list[CheckResult] = field(default_factory=list)


def run_suite(
    make_backend: Callable[[], Backend] | None,
    endpoint: str,
    connect: Connect,
    profile: str = "",
    tolerance_lsb: int = 0,
) -> Report:
    """Runs everything that can be run.

    Args:
        make_backend: builds the backend, once for the process and, without an endpoint, once for a server of
            our own, one after the other; None: only what is behind the endpoint.
        endpoint: of a server that is there; empty: starts one on a unix socket.
        connect: endpoint -> target.
        profile: profile that the user named.
        tolerance_lsb: for arithmetic that is none of ours.

    Raises:
        NpuError: the backend cannot be opened, or the server does not answer.
    """
    found, capabilities = _Findings(), None
    if make_backend is not None:
        backend = make_backend()
        try:
            target = LocalTarget(backend)
            capabilities = target.capabilities
            _examine(found, target, capabilities, profile, tolerance_lsb)
            _run_checks(found, target, in_process_checks())
        finally:
            backend.close()
    with _server(make_backend, endpoint) as address:
        remote = connect(address)
        try:
            if capabilities is None:
                capabilities = remote.capabilities
                _examine(found, remote, capabilities, profile, tolerance_lsb)
            else:
                _run_checks(found, remote, contract_checks())
                found.checks += _wire_transparency(remote, capabilities, found.trials)
        finally:
            remote.close()
    assert found.judge is not None
    return Report(
        capabilities.fingerprint,
        found.judge.name,
        found.judge.tolerance_lsb == 0,
        tuple(found.operators),
        tuple(found.checks),
    )


def _examine(
    found: _Findings, target: Target, capabilities: Capabilities, profile: str, tolerance_lsb: int
) -> None:
    found.judge = choose_judge(capabilities, profile, tolerance_lsb)
    found.operators, found.trials = try_operators(target, found.judge, all_cases())
    _run_checks(found, target, contract_checks())


def _run_checks(found: _Findings, target: Target, checks: Iterable[tuple[str, Check]]) -> None:
    try:
        probe = make_probe(target, probe_candidates(), lambda case: next(range_variants(case))[1])
    except InvalidInput as error:
        result = CheckResult(
            target.route, "weights", "A model with weights can be run", Verdict.FAILED, str(error)
        )
        found.checks.append(result)
        return
    for group, check in checks:
        # A batch of its own for each check: a backend that writes into one is not helped by it later on.
        probe = replace(probe, batch=codes(probe.case.seed, probe.case.shape))
        found.checks.append(_run_check(target, probe, group, check))


def _run_check(target: Target, probe: Probe, group: str, check: Check) -> CheckResult:
    demand = (check.__doc__ or check.__name__).splitlines()[0].removesuffix(".")
    if group in _NEEDS_DETERMINISM and not target.capabilities.deterministic:
        detail = "the backend declares itself not deterministic"
        return CheckResult(target.route, group, demand, Verdict.NOT_APPLICABLE, detail)
    try:
        try:
            check(probe)
        finally:
            probe.release()
    except Broken as error:
        return CheckResult(target.route, group, demand, Verdict.FAILED, str(error))
    except Exception as error:  # a vendor's code may raise anything, and the other checks still count
        return CheckResult(target.route, group, demand, Verdict.FAILED, f"{type(error).__name__}: {error}")
    return CheckResult(target.route, group, demand, Verdict.PASSED)


def _wire_transparency(remote: Target, local: Capabilities, trials: Iterable[Trial]) -> Iterator[CheckResult]:
    """The same trials over the wire: equal capabilities, layer maps, bits and refusals."""

    def result(name: str, problem: str, passed: str = "") -> CheckResult:
        verdict = Verdict.FAILED if problem else Verdict.PASSED
        return CheckResult(remote.route, "transparency", name, verdict, problem or passed)

    problem = (
        "" if remote.capabilities == local else f"the server says {remote.capabilities}, the backend {local}"
    )
    yield result("The server describes the backend as it describes itself", problem)
    elements, problem = 0, ""
    for trial in trials:
        try:
            again = attempt(remote, trial.case, trial.ranges, trial.batch)
        except Exception as error:  # as above
            problem = problem or f"{trial.case.op}, {trial.case.title}: {type(error).__name__}: {error}"
            continue
        elements += sum(tensor.size for tensor in trial.outputs.values())
        problem = problem or _difference(trial, again)
    yield result(
        "Equal layer maps, bits and refusals as in the process", problem, f"{elements} elements equal"
    )


def _difference(local: Trial, remote: Trial) -> str:
    title = f"{local.case.op}, {local.case.title}"
    if (type(local.refusal), str(local.refusal)) != (type(remote.refusal), str(remote.refusal)):
        return f"{title}: refused with {remote.refusal!r}, in the process {local.refusal!r}"
    if local.layer_map != remote.layer_map:
        return f"{title}: another layer map than in the process"
    if local.outputs.keys() != remote.outputs.keys():
        return (
            f"{title}: layers {sorted(local.outputs.keys() ^ remote.outputs.keys())} came on one route only"
        )
    for name, tensor in local.outputs.items():
        if not np.array_equal(tensor, remote.outputs[name]):
            return f"{title}: '{name}' has other bits than in the process"
    return ""


@contextmanager
def _server(make_backend: Callable[[], Backend] | None, endpoint: str) -> Iterator[str]:
    if endpoint:
        yield endpoint
        return
    if make_backend is None:
        raise InvalidInput("nothing to examine; give a backend or an endpoint")
    with tempfile.TemporaryDirectory(prefix="npu-conformance-") as folder:
        config = ServeConfig.model_validate({"listen": f"unix:{folder}/npu.sock", "http": "off"})
        with serve(make_backend(), config) as server:
            yield server.address
