"""``python -m deploy.release``: what `make lock`, `make audit` and `make release` run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from deploy.release import REQUIREMENTS, ROOT, Project, ReleaseError, check_changelog, git
from deploy.release import lock as locking
from deploy.release.artifacts import build, check_sdist, check_wheel, commit_time, sha256
from deploy.release.bill import bill, check_bill, check_licences

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Make a release of this checkout."
)
SUMS = "SHA256SUMS"


@app.command()
def lock(
    upgrade: Annotated[bool, typer.Option(help="Take the newest versions that fit")] = False,
) -> None:
    """Write deploy/requirements/*.txt from pyproject.toml."""
    for path in locking.write(upgrade=upgrade):
        typer.echo(path.relative_to(ROOT))
    check_licences(ROOT / REQUIREMENTS)


@app.command()
def check(folder: Annotated[Path, typer.Option(help="The checkout")] = ROOT) -> None:
    """Check lock files, licences and changelog against pyproject.toml; needs no network."""
    locking.check(folder / REQUIREMENTS, folder)
    check_licences(folder / REQUIREMENTS)
    check_changelog(folder, Project.read(folder).version)


@app.command()
def audit(
    service: Annotated[str, typer.Option(help="Whom to ask: pypi or osv")] = "pypi",
    osv_url: Annotated[str | None, typer.Option(help="Another address of osv")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A vulnerability that does not concern us; say why")
    ] = None,
) -> None:
    """Look up known vulnerabilities, of what is locked and what is installed; needs a network."""
    asking = [sys.executable, "-m", "pip_audit", "--vulnerability-service", service]
    asking += ["--progress-spinner", "off", *(["--osv-url", osv_url] if osv_url else [])]
    asking += [word for each in ignore or [] for word in ("--ignore-vuln", each)]
    names = (*locking.IMAGES, locking.TORCH, locking.BUILD)
    locked = {
        # The build tools' versions are apart from the images'.
        name: {pin.name: pin.version for each in group for pin in locking.pins(each)}
        for name, group in (("images", names[:-1]), ("build tools", names[-1:]))
    }
    with tempfile.TemporaryDirectory() as scratch:
        runs = {"this environment": [*asking, "--local", "--skip-editable"]}
        for name, versions in locked.items():
            listed = Path(scratch, f"{name}.txt")
            listed.write_text("".join(f"{each}=={versions[each]}\n" for each in versions))
            # Strict: what the service does not know is no good news.
            options = ["--strict", "--no-deps", "--disable-pip", "-r", str(listed)]
            runs[name] = [*asking, *options]
        found = []
        for name, command in runs.items():
            typer.echo(f"{name}:", err=True)
            if subprocess.run(command, check=False).returncode:  # noqa: S603 - no shell
                found.append(name)
    if found:
        raise ReleaseError(
            f"expected no known vulnerability, and an answer for each package; see {found[0]} above"
        )


@app.command()
def make(
    out: Annotated[Path, typer.Option(help="A folder that is not there yet")] = Path("dist"),
    folder: Annotated[Path, typer.Option(help="The checkout")] = ROOT,
    dev: Annotated[bool, typer.Option(help="Also a version that is in development")] = False,
) -> None:
    """Build wheel, source distribution, bills of materials and checksums of the newest commit."""
    project = Project.read(folder)
    check_tree(folder, project, dev=dev)
    check(folder)
    if out.exists():
        raise ReleaseError(f"expected no {out}; there is one; move it away")
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "made")
        sdist, wheel = build(folder, made)
        tracked = git(folder, "ls-tree", "-r", "-z", "--name-only", "HEAD").rstrip("\0")
        check_sdist(sdist, project, tracked.split("\0"))
        check_wheel(wheel, project)
        for image in locking.IMAGES:
            text = bill(image, project, wheel, commit_time(folder), folder / REQUIREMENTS)
            check_bill(text)
            name = f"{project.name}-{image}-{project.version}.cdx.json"
            (made / name).write_text(text, encoding="utf-8")
        files = sorted(made.iterdir())
        sums = "".join(f"{sha256(path)}  {path.name}\n" for path in files)
        (made / SUMS).write_text(sums, encoding="utf-8")
        shutil.move(made, out)
    typer.echo(sums, nl=False)


def check_tree(folder: Path, project: Project, *, dev: bool) -> None:
    """Only what is committed is released, and what is in development only on purpose.

    Raises:
        ReleaseError: something is not committed, or the version ends with ``.dev``.
    """
    if changed := git(folder, "status", "--porcelain").splitlines():
        raise ReleaseError(
            f"expected everything to be committed; git status says {changed[0]!r}, and "
            f"{len(changed) - 1} more; commit it, or put it away"
        )
    if project.version.is_devrelease and not dev:
        raise ReleaseError(
            f"expected a version to release; pyproject.toml has {project.version}; take the .dev "
            "away, or pass --dev"
        )


def main() -> None:
    """Run a command; an error is one line and exit code 1."""
    try:
        app()
    except ReleaseError as error:
        typer.echo(str(error), err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
