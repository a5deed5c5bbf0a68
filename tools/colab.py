"""Runs notebooks as Colab would: an environment with Colab's packages, an empty folder, the package from the repository.

    python tools/colab.py [--python PYTHON] [book/.../01_x.ipynb ...]      (none: all of them)

The notebook is not touched. Its install cell asks git for the repository's address, and git is told by environment
variables alone that this address is a clone of this checkout; so what is tested are the committed files. For each
notebook: verdict, minutes (the installation of the package included), peak memory, and the preinstalled packages that
the installation changed: one that changed is a failure. The environment is made once and kept under build/colab.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
URL = re.search(r"(?m)^Source = \"(.*)\"$", (ROOT / "pyproject.toml").read_text()).group(1)
# NumPy, SciPy and autograd as in Colab's published list of August 2026 (there on Python 3.13, with torch 2.11.0); torch
# is the build that the book is pinned to, the only one without CUDA that is to be had everywhere; the others are what
# a notebook server there needs or what we import, in versions of that time.
SHIPPED = ["numpy==2.1.3", "scipy==1.16.3", "autograd==1.9.1", "torch==2.13.0", "matplotlib==3.10.0",
           "scikit-learn==1.6.1", "mpmath==1.3.0", "pooch==1.8.2", "tqdm", "safetensors", "ipykernel==6.17.1", "ipython==7.34.0",
           "nbconvert", "setuptools<81"]
SHOWN = ["numpy", "scipy", "autograd", "torch", "matplotlib", "scikit-learn"]
INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")


def environment(python):
    """The folder of a virtual environment with what Colab ships; made when it is not there yet."""
    version = subprocess.run([python, "-c", "import sys; print(sys.version)"], capture_output=True, text=True, check=True)
    name = hashlib.sha256("\n".join([version.stdout, *SHIPPED]).encode()).hexdigest()[:12]
    venv = ROOT / "build" / "colab" / name
    if (venv / "ready").exists():
        return venv
    shutil.rmtree(venv, ignore_errors=True)
    print(f"making Colab's environment in build/colab/{name} (once)", flush=True)
    if subprocess.run([python, "-m", "venv", venv], capture_output=True).returncode:  # no ensurepip: borrow this pip
        subprocess.run([python, "-m", "venv", "--clear", "--without-pip", venv], check=True)
        subprocess.run([python, "-m", "pip", "--python", venv / "bin/python", "install", "-q", "pip"], check=True)
    pip = [*pip_of(venv), "install", "-qq"]
    index = ["--retries", "1", "--extra-index-url", INDEX] if INDEX else []
    torch = next(need for need in SHIPPED if need.startswith("torch=="))
    run = subprocess.run([*pip, *index, torch], capture_output=True, text=True)  # warns of an index out of reach
    if run.returncode:
        raise SystemExit(f"{torch} could not be installed:\n{run.stderr}")
    subprocess.run([*pip, *SHIPPED], check=True)
    (venv / "ready").touch()
    return venv


def pip_of(venv):
    """The command of its pip; -I, or pip would also list, and refuse to remove, what PYTHONPATH leads to."""
    return [venv / "bin/python", "-I", "-m", "pip", "--disable-pip-version-check"]


def packages(venv):
    """{name: version} of what is installed there."""
    listed = subprocess.run([*pip_of(venv), "list", "--format=json"], capture_output=True, text=True, check=True)
    return {package["name"].lower(): package["version"] for package in json.loads(listed.stdout)}


def changes(before, after):
    """What an installation did to packages that were there: "numpy 2.1.3 -> 2.4.0". What is new is no change."""
    return [f"{name} {version} -> {after.get(name, 'removed')}" for name, version in sorted(before.items())
            if after.get(name) != version]


def colab_environment(venv, folder):
    """Environment variables of a fresh machine: no path to this checkout but git's, no caches, no data."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DLGM_", "PYTHON", "JUPYTER", "MPL"))}
    return {**kept, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(venv),
            "XDG_CACHE_HOME": str(folder / ".cache"), "JUPYTER_DATA_DIR": str(folder / ".jupyter"),
            "IPYTHONDIR": str(folder / ".ipython"), "MPLCONFIGDIR": str(folder / ".matplotlib"),
            "PIP_CACHE_DIR": str(Path.home() / ".cache" / "pip"), "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf", "GIT_CONFIG_VALUE_0": URL}


def passport(notebook, venv):
    """Run one notebook; {ok, minutes, megabytes, changed, added, error}. The environment is as before afterwards."""
    before = packages(venv)
    with tempfile.TemporaryDirectory() as tmp:
        folder, state = Path(tmp, "content"), Path(tmp, "state")
        folder.mkdir()
        shutil.copy(notebook, folder)
        start = time.perf_counter()
        with open(Path(tmp, "errors"), "w+") as errors:
            run = subprocess.Popen(
                [venv / "bin/python", "-m", "nbconvert", "--to", "notebook", "--execute", "--output", "executed.ipynb",
                 "--ExecutePreprocessor.timeout=600", "--ExecutePreprocessor.kernel_name=python3", notebook.name],
                cwd=folder, env=colab_environment(venv, state), stdout=errors, stderr=errors)
            _, status, usage = os.wait4(run.pid, 0)  # memory of the largest process in it: the kernel
            run.returncode = os.waitstatus_to_exitcode(status)
            errors.seek(0)
            error = re.sub(r"\x1b\[[\d;]*m", "", errors.read())[-2000:] if run.returncode else ""
        minutes = (time.perf_counter() - start) / 60
        after = packages(venv)
        if "dlgm-tutorial" not in after:  # pip's own words stay in the notebook, which is not written then
            pip = [*pip_of(venv), "install", "--dry-run", "-q", f"git+{URL}"]
            retry = subprocess.run(pip, env=colab_environment(venv, state), capture_output=True, text=True)
            error = f"the package was not installed by the notebook\n{error}\n{retry.stderr[-1500:]}"
    added = sorted(set(after) - set(before))
    if added:
        subprocess.run([*pip_of(venv), "uninstall", "-q", "-y", *added], check=True, stderr=subprocess.DEVNULL)
        if set(added) & set(packages(venv)):
            raise RuntimeError(f"{venv}: {', '.join(added)} could not be removed again")
    changed = changes(before, after)
    if changed:  # no longer Colab's packages: to be made anew
        (venv / "ready").unlink()
    return {"ok": not error and not changed, "minutes": minutes, "megabytes": usage.ru_maxrss / 1024,
            "changed": changed, "added": added, "error": error}


def uncommitted():
    """Files that differ from the commit, which is all that a clone sees."""
    status = subprocess.run(["git", "-C", ROOT, "status", "--porcelain", "--", "dlgm_tutorial", "book/results",
                             "pyproject.toml"], capture_output=True, text=True, check=True)
    return status.stdout.splitlines()


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Run notebooks as Colab would.")
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the Python of the emulated machine")
    options = parser.parse_args(arguments)
    notebooks = [path.resolve() for path in options.notebooks] or sorted(ROOT.glob("book/[0-9]*/[0-9]*.ipynb"))
    for path in notebooks:
        if path.suffix != ".ipynb" or not path.is_file():
            parser.error(f"{path} is not a notebook")
    if uncommitted():
        print(f"note: {len(uncommitted())} files are not committed; the passport sees the committed ones only")
    failed = 0
    for path in notebooks:
        venv = environment(options.python)
        result = passport(path, venv)
        failed += not result["ok"]
        print(f"{'ok  ' if result['ok'] else 'FAIL'} {path.parent.name}/{path.name}: {result['minutes']:.1f} minutes, "
              f"{result['megabytes']:.0f} MB, installed {', '.join(result['added']) or 'nothing'}, "
              f"changed {', '.join(result['changed']) or 'nothing'}", flush=True)
        if result["error"]:
            print(result["error"])
    if notebooks:
        versions = packages(environment(options.python))
        print("with " + ", ".join(f"{name} {versions[name]}" for name in SHOWN) + " on " + subprocess.run(
            [options.python, "--version"], capture_output=True, text=True, check=True).stdout.strip())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
