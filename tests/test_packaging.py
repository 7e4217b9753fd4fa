"""What somebody deploys: locked requirements, a list of parts, a wheel that anybody can build again, manifests."""

import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from entropi import __version__, cli

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
TOOLS = ROOT / ".venv-tools" / "bin"
EPOCH = "1700000000"
with_tools = pytest.mark.skipif(not (TOOLS / "uv").exists(), reason="`make tools` has not been run")


def pinned(path):
    """Name -> version and hashes of a lock file."""
    text = path.read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            requirement = re.match(r"([A-Za-z0-9._-]+)==(\S+)", line)
            assert requirement, line
            hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})(?:\s|$)", line)
            found[requirement[1].lower().replace("_", "-")] = (requirement[2], hashes)
    return found


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints():
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines)}


@pytest.mark.parametrize("path", ["requirements.lock", "deploy/tools.lock"])
def test_every_requirement_is_pinned_by_hash(path):
    found = pinned(ROOT / path)
    assert len(found) > 20
    assert [name for name, (_, hashes) in found.items() if not hashes] == []


def test_the_lock_is_what_was_tested_and_all_of_it():
    found, tested = pinned(ROOT / "requirements.lock"), constraints()
    assert {name: version for name, (version, _) in found.items()} == {name: tested[normal(name)] for name in found}
    wanted = [
        normal(re.match(r"[A-Za-z0-9._-]+", line)[0])
        for line in (DEPLOY / "requirements.in").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert set(wanted) <= set(found)
    assert not {"torch", "transformers", "accelerate"} & set(found)  # a server of a folded model needs none of them
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert "pip install --require-hashes -r requirements.lock" in page


@with_tools
@pytest.mark.slow
def test_the_list_of_parts_has_every_locked_one_with_its_hash(tmp_path):
    words = [
        "requirements",
        ROOT / "requirements.lock",
        "--pyproject",
        ROOT / "pyproject.toml",
        "--output-reproducible",
    ]
    texts = []
    for number in range(2):
        path = tmp_path / f"{number}.json"
        environment = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
        subprocess.run([TOOLS / "cyclonedx-py", *words, "--output-file", path], check=True, env=environment)
        texts.append(path.read_bytes())
    assert texts[0] == texts[1]
    parts = json.loads(texts[0])
    assert parts["bomFormat"] == "CycloneDX"
    assert parts["metadata"]["component"]["name"] == "entropi"
    listed = {normal(part["name"]): part["version"] for part in parts["components"]}
    assert listed == {name: version for name, (version, _) in pinned(ROOT / "requirements.lock").items()}
    assert {"spu", "cryptography", "aiohttp"} <= set(listed)
    command = subprocess.run(["make", "-n", "sbom"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "cyclonedx-py requirements requirements.lock" in command
    assert f'version = "{__version__}"' in command  # the list names this version, which stands in the package alone


def test_the_version_stands_in_one_place():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert 'version = {attr = "entropi.__version__"}' in project
    assert not re.search(r"^version = \"", project, flags=re.MULTILINE)


@with_tools
@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="this is no clone")
def test_two_builds_are_the_same_wheel(tmp_path):
    """In other folders, at other times, by users whose umask differs."""
    digests = []
    for number, umask in ((0, 0o022), (1, 0o077)):
        folder = tmp_path / str(number) / ("deeper" * number)
        subprocess.run(["git", "clone", "--quiet", "--no-local", ROOT, folder], check=True, umask=umask)
        subprocess.run(
            ["make", f"TOOLS={TOOLS.parent}", "-o", TOOLS.parent / ".installed", "wheel"],
            cwd=folder,
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": ""},
            umask=umask,
        )
        (wheel,) = (folder / "dist").iterdir()
        digests.append(hashlib.sha256(wheel.read_bytes()).hexdigest())
        with zipfile.ZipFile(wheel) as opened:
            infos = opened.infolist()
        assert "entropi/private/sessions/server.py" in [info.filename for info in infos]
        committed = subprocess.run(
            ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, check=True
        ).stdout
        date = datetime.datetime.fromtimestamp(int(committed), datetime.timezone.utc)
        assert {datetime.datetime(*info.date_time, tzinfo=datetime.timezone.utc) for info in infos} <= {
            date.replace(second=date.second // 2 * 2)  # as archives have them
        }
    assert digests[0] == digests[1]


@with_tools
@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="this is no clone")
def test_the_wheel_works_in_an_environment_of_its_own(tmp_path):
    """Built from a clean clone; its dependencies are those of the environment that the tests run in."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--no-local", ROOT, clone], check=True)
    tools = [f"TOOLS={TOOLS.parent}", "-o", TOOLS.parent / ".installed"]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(["make", *tools, "wheel"], cwd=clone, check=True, capture_output=True, env=bare)
    (wheel,) = (clone / "dist").glob("*.whl")

    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, env=bare)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def output(*words):
        return subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True, env=bare).stdout

    assert output(folder / "bin" / "entropi", "--version") == f"entropi {__version__}\n"
    assert "diagnose" in output(folder / "bin" / "entropi", "--help")
    home = Path(output(python, "-c", "import entropi; print(entropi.__file__)").strip()).parent
    assert home == packages / "entropi"
    committed = subprocess.run(
        ["git", "ls-files"], cwd=clone / "src" / "entropi", check=True, capture_output=True, text=True
    ).stdout.split()
    assert {"report/page.html.j2", "entropy/native.cpp", "costs/cheetah.json", "py.typed"} <= set(committed)
    assert [name for name in committed if not (home / name).is_file()] == []
    predicted = json.loads(output(folder / "bin" / "entropi", "cost", "--layers", "1", "--seq-len", "8", "--json"))
    assert predicted["prediction"]["prompt"]["total"]["bytes"] > 0  # from prices that the wheel brings
    entropies = "import entropi, torch; x = torch.ones(1, 1, 2, 8); print(entropi.entropy_attention(x, x, x)[1].sum())"
    assert output(python, "-c", entropies).startswith("tensor(0.69")  # ln 2: the second row sees two equal keys


# --- Units and manifests ----------------------------------------------------------------------------------------------


def serve_options(words):
    """What `entropi serve` makes of a command line; it exits if there is an option it does not know."""
    return cli.build_parser().parse_args(cli._with_underscores(words)).serve


def test_the_unit_starts_a_server():
    text = (DEPLOY / "entropi.service").read_text()
    (command,) = re.findall(r"^ExecStart=\S+/bin/entropi (.*)$", text, flags=re.MULTILINE)
    options = serve_options(shlex.split(command))
    assert options.revoked is not None
    assert options.audit_log is not None
    assert "kill -HUP" in text
    assert "StateDirectory=entropi" in text
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert "deploy/entropi.service" in page


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path):
    unit = tmp_path / "entropi.service"
    text = (DEPLOY / "entropi.service").read_text()
    unit.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={shutil.which('true')}", text, flags=re.MULTILINE))
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (checked.returncode, [line for line in checked.stderr.splitlines() if "entropi.service" in line]) == (0, [])


def test_the_manifest_starts_servers_that_share_quotas():
    found = {
        (part["kind"], part["metadata"]["name"]): part
        for part in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    }
    pod = found["Deployment", "entropi"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = serve_options([*container["command"][1:], *container["args"]])
    host, port = re.fullmatch(r"redis://([^:]+):(\d+)/0", options.quota_store).groups()
    assert int(port) in [each["port"] for each in found["Service", host]["spec"]["ports"]]
    assert options.listen == "0.0.0.0:9000"
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    for path in (options.tls_cert, options.tls_key, options.clients_ca, options.revoked):
        assert str(path).startswith(mounts["tls"] + "/")
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in found["Service", "entropi"]["spec"]["ports"]} <= ports
    label = found["Deployment", "entropi"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("Service", "NetworkPolicy", "PodDisruptionBudget"):
        spec = found[kind, "entropi"]["spec"]
        selector = spec.get("podSelector", spec.get("selector", None))
        assert selector in (label, {"matchLabels": label})


@pytest.mark.slow
@with_tools
def test_the_manifest_follows_the_schemas_of_kubernetes():
    words = [TOOLS / "kubernetes-validate", "--strict", DEPLOY / "kubernetes.yaml"]
    checked = subprocess.run(words, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert (checked.stdout + checked.stderr).count("passed for resource") == 7


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
def test_haproxy_takes_its_configuration():
    checked = subprocess.run(["haproxy", "-c", "-f", DEPLOY / "haproxy.cfg"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_how_to_report_a_flaw():
    text = (ROOT / "SECURITY.md").read_text()
    for target in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (ROOT / target).exists(), target
