import importlib
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch

from rewrite_core import backends, ops
from rewrite_core.backends import Backend, BackendUnavailable, backends_of, explain, select
from rewrite_core.cli.entry import main
from rewrite_core.errors import RewriteCoreError
from rewrite_core.ops.second_moment_op import reference, register

FEATURES = torch.ones(2, 3)


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("REWRITE_CORE_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def run(code, environment=None):
    """Away from the source tree, which `python -c` would import in place of the installed package."""
    with tempfile.TemporaryDirectory() as elsewhere:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )


def run_without_extension(code, failure="ModuleNotFoundError('No module named x', name='rewrite_core._C')"):
    """Run code in a process where importing rewrite_core._C fails as told."""
    prelude = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "rewrite_core._C":
            raise {failure}
sys.meta_path.insert(0, Refuse())
"""
    environment = {key: value for key, value in os.environ.items() if key != "REWRITE_CORE_BACKEND"}
    return run(prelude + code, environment)


def test_extension_is_built():
    """Optional for users, not for the tests: most of them would have nothing to test."""
    assert backends.extension_reason() is None
    assert backends.extension().isa() in ("portable", "avx2", "avx512")


@pytest.mark.parametrize("op", backends.OPS)
def test_every_op_has_a_reference_and_a_cpu_extension(op):
    records = backends_of(op)
    names = [record.name for record in records]
    assert names == [name for name in backends.ORDER if name in names], "not in the order of auto"
    assert "cpp" in names and names[-1] == "reference"
    assert all(record.op == op for record in records)
    args = importlib.import_module(f"rewrite_core.ops.{op}_op.register").example("cpu")
    assert select(op, "auto", *args).name == "cpp"
    assert select(op, "reference", *args).name == "reference"
    for name in ("cpp", "reference"):
        assert select(op, name, *args).load() is not None


def test_records_are_frozen():
    record = backends_of("second_moment")[0]
    with pytest.raises(AttributeError):
        record.name = "other"


def test_unknown_names_are_refused():
    with pytest.raises(RewriteCoreError, match="'fast' is no backend: use auto, triton, cpp, reference"):
        select("second_moment", "fast", FEATURES)
    with pytest.raises(RewriteCoreError, match="no op 'first_moment'"):
        select("first_moment", "auto", FEATURES)


def test_explicit_backend_runs_or_raises_with_the_reason():
    with pytest.raises(BackendUnavailable, match="'cuda': second_moment has no such backend; it has triton, cpp"):
        select("second_moment", "cuda", FEATURES)
    with pytest.raises(BackendUnavailable, match="triton: .*on cpu|triton: triton is not installed"):
        select("second_moment", "triton", FEATURES)


def records(*rows):
    return tuple(Backend("second_moment", name, "math:pi", supports, declines) for name, supports, declines in rows)


def test_auto_takes_the_first_that_supports_the_call(monkeypatch):
    never, always = (lambda *a: "it cannot"), (lambda *a: None)

    def chosen(backend, *rows):
        with monkeypatch.context() as patch:
            patch.setattr(register, "BACKENDS", records(*rows))
            patch.setattr(backends, "backends_of", backends_of.__wrapped__)  # the other one remembers what there was
            return select("second_moment", backend, FEATURES).name

    fine = ("reference", always, always)
    assert chosen("auto", fine, ("cuda", always, always), ("cpp", always, always)) == "cuda"
    assert chosen("auto", fine, ("cuda", never, always), ("cpp", always, always)) == "cpp"
    assert chosen("auto", fine, ("cpp", always, never)) == "reference", "auto passes over what declines"
    assert chosen("cpp", fine, ("cpp", always, never)) == "cpp", "by name it runs all the same"
    with pytest.raises(BackendUnavailable, match="cpp: it cannot; reference: it cannot"):
        chosen("auto", ("reference", never, always), ("cpp", never, always))


def test_supports_sees_the_arguments():
    record = next(record for record in register.BACKENDS if record.name == "cpp")
    assert record.supports(FEATURES) is None
    assert "meta" in record.supports(FEATURES.to("meta"))


def test_environment_variable_replaces_auto_and_nothing_else(monkeypatch):
    monkeypatch.setenv("REWRITE_CORE_BACKEND", "reference")
    assert select("second_moment", "auto", FEATURES).name == "reference"
    assert select("second_moment", "cpp", FEATURES).name == "cpp"
    assert {choice.backend for choice in explain().choices} == {"reference"}
    assert 'REWRITE_CORE_BACKEND=reference replaces "auto"' in str(explain())
    monkeypatch.setenv("REWRITE_CORE_BACKEND", "quickest")
    with pytest.raises(ValueError, match="REWRITE_CORE_BACKEND='quickest' is no backend"):
        select("second_moment", "auto", FEATURES)
    monkeypatch.setenv("REWRITE_CORE_BACKEND", "cuda")
    with pytest.raises(BackendUnavailable, match="environment variable REWRITE_CORE_BACKEND="):
        select("second_moment", "auto", FEATURES)
    assert {choice.backend for choice in explain().choices} == {"none"}, "explain explains, it does not raise"


def test_an_unknown_backend_is_one_sentence_on_the_command_line(monkeypatch, capsys):
    monkeypatch.setenv("REWRITE_CORE_BACKEND", "quickest")
    assert main(["info"]) == 2
    assert "REWRITE_CORE_BACKEND='quickest' is no backend: use auto" in capsys.readouterr().err


def test_public_ops_honour_the_choice(monkeypatch):
    """What select says is what runs: each backend is replaced by one that leaves a mark."""
    for module, name, mark in ((register, "run_cpp", 2.0), (reference, "run_reference", 3.0)):
        monkeypatch.setattr(module, name, lambda features, out, mark=mark: out.fill_(mark))
    backends._load.cache_clear()
    try:
        assert ops.second_moment(FEATURES)[0, 0] == 2
        assert ops.second_moment(FEATURES, backend="reference")[0, 0] == 3
        monkeypatch.setenv("REWRITE_CORE_BACKEND", "reference")
        assert ops.second_moment(FEATURES)[0, 0] == 3
    finally:
        backends._load.cache_clear()


def test_explain_names_every_op_and_every_reason():
    explanation = explain()
    cpu = [choice for choice in explanation.choices if choice.device == "cpu"]
    assert [choice.op for choice in cpu] == list(backends.OPS)
    for choice in cpu:
        assert choice.backend == "cpp"
        assert {name for name, _ in choice.reasons} == {r.name for r in backends_of(choice.op)} - {"cpp"}
        assert all(reason for _, reason in choice.reasons)
    table = str(explanation)
    for op in backends.OPS:
        assert op in table
    assert "reference: cpp comes first" in table
    assert "_C" in table and backends.extension().isa() in table


def test_explain_says_when_the_environment_asks_for_a_backend_that_cannot(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "triton")
    table = str(explain())
    assert "none" in table and "cpp: REWRITE_CORE_BACKEND=triton asks for another" in table
    assert "none comes first" not in table


def test_works_without_the_extension():
    done = run_without_extension("""
import importlib, torch
from rewrite_core.backends import explain, BackendUnavailable
from rewrite_core.ops import second_moment, spd_solve
c = second_moment(torch.eye(3))
assert torch.equal(c, torch.eye(3, dtype=torch.float64))
assert torch.equal(spd_solve(c, torch.ones(3)), torch.ones(3, dtype=torch.float64))
try:
    second_moment(torch.eye(3), backend="cpp")
except BackendUnavailable as error:
    print(error)
print(explain())
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rewrite_core._C is not built: run `pip install .`") >= 3
    assert "second_moment  cpu     reference" in done.stdout


def test_broken_extension_says_what_is_broken():
    done = run_without_extension(
        "from rewrite_core.backends import explain; print(explain())",
        failure="ImportError('libfoo.so.7: cannot open shared object file', name='rewrite_core._C')",
    )
    assert done.returncode == 0, done.stderr
    assert "libfoo.so.7: cannot open shared object file" in done.stdout
    assert "is not built" not in done.stdout


def test_import_errors_inside_the_extension_are_not_swallowed():
    done = run_without_extension(
        "from rewrite_core.backends import explain; explain()",
        failure="ModuleNotFoundError('No module named other', name='other')",
    )
    assert done.returncode != 0 and "No module named other" in done.stderr


def test_nothing_is_loaded_before_it_is_used():
    code = """
import sys
import rewrite_core.ops
assert "rewrite_core._C" not in sys.modules, "extension"
assert "rewrite_core.kernels" not in sys.modules, "kernels"
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_first_calls_do_not_import_the_compiler():
    code = """
import sys, torch
import rewrite_core as rc
c = rc.ops.second_moment(torch.eye(3))
rc.ops.spd_solve(c, torch.ones(3, 1))
rc.ops.fit_low_rank(torch.ones(1, 4), torch.zeros(2, 4), torch.ones(2, 4))
assert "torch._dynamo" not in sys.modules
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def solvable(generator):
    rows = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    return rows.T @ rows, torch.randn(4, generator=generator, dtype=torch.float64)


def fittable(generator):
    return [torch.randn(*shape, generator=generator) for shape in ((2, 7), (3, 7), (3, 7))]


def projectable(generator):
    return [torch.randn(*shape, generator=generator) for shape in ((2, 1, 1, 1, 3), (4, 1, 3), (4, 1, 3))]


def added_to(features):
    return ops.second_moment(features, out=torch.ones(features.shape[1], features.shape[1], dtype=torch.float64))


CALLS = {  # a function of tensors, and what makes them
    "second_moment": (ops.second_moment, lambda generator: [torch.randn(5, 3, 2, 2, generator=generator)]),
    "second_moment, out": (added_to, lambda generator: [torch.randn(5, 3, generator=generator)]),
    "spd_solve": (ops.spd_solve, solvable),
    "fit_low_rank": (lambda *given: ops.fit_low_rank(*given, slope=0.2).coefficients, fittable),
    "fit_projected": (lambda *given: ops.fit_projected(*given, steps=3, slope=0.2).coefficients, projectable),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CALLS)
def test_torch_sees_ops_it_traces(name):
    """A trace that held the numbers of the call it was made of would answer them for ever."""
    call, make = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    traced = torch.jit.trace(call, tuple(make(generator)), check_trace=False)
    others = make(generator)
    assert torch.equal(traced(*others), call(*others))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in CALLS if "out" not in name])
def test_torch_sees_ops_it_transforms(name):
    call, make = CALLS[name]
    generator = torch.Generator().manual_seed(1)
    several = [make(generator) for _ in range(3)]
    one, *_ = wanted = [call(*given) for given in several]
    assert torch.equal(torch.vmap(call)(*map(torch.stack, zip(*several))), torch.stack(wanted))
    partly = torch.vmap(lambda last: call(*several[0][:-1], last))(torch.stack([given[-1] for given in several]))
    assert torch.equal(partly[0], one)
    assert torch.equal(torch.func.functionalize(call)(*several[0]), one)
    value, tangent = torch.func.jvp(call, tuple(several[0]), tuple(several[1]))
    assert torch.equal(value, one) and not tangent.any()
    assert not torch.func.grad(lambda *given: call(*given).sum())(*several[0]).any()


@pytest.mark.parametrize(("version", "fits"), [((3, 4), False), ((3, 5), True), ((3, 10), True), (None, True)])
def test_a_triton_that_does_not_compile_a_kernel_is_passed_over(monkeypatch, version, fits):
    """ "auto" must not choose it: the failure would come from the compiler, in the middle of an edit."""
    monkeypatch.setattr(backends, "triton_version", lambda: version)
    monkeypatch.setattr(backends, "_triton_missing", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for op in ("fit_low_rank", "fit_projected", "second_moment"):
        example = importlib.import_module(f"rewrite_core.ops.{op}_op.register").example("cpu")
        record = next(record for record in backends_of(op) if record.name == "triton")
        reason = record.supports(*example)
        if fits or op == "second_moment":
            assert reason is None
        else:
            assert reason.startswith("it needs Triton 3.5 or newer, and 3.4 is installed")


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((10, 3), True)])
def test_an_old_gpu_is_not_given_to_triton_unasked(monkeypatch, capability, fast):
    monkeypatch.setattr(backends, "_capability", lambda device: capability)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    for op in ("fit_low_rank", "fit_projected", "second_moment"):
        record = next(record for record in backends_of(op) if record.name == "triton")
        reason = record.declines(on_gpu)
        if fast:
            assert reason is None
        else:
            assert reason.startswith("this GPU has compute capability 7.5, and Triton is made for 8.0 and newer: ")


def test_a_notebook_shows_the_table():
    from html.parser import HTMLParser

    shown = explain()._repr_html_()
    open_tags, text = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag != "br":
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

        def handle_data(self, data):
            text.append(data)

    Reader().feed(shown)
    assert not open_tags
    words = " ".join(text)
    for choice in explain().choices:
        assert choice.op in words and all(f"{name}" in words and why in words for name, why in choice.reasons)
