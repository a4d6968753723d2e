"""``qarm codebook``: train, evaluate, publish, fill, compare and remove codebook versions.

Parsing and printing only; the work is in ``codebook_jobs``, ``codebook_release``, ``backfill`` and
``registry``, imported when a command runs, so that ``--help`` stays fast. May import: click.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from qarm_feast.command import config_option, log_level_option, start_logging
from qarm_feast.config import load_section

if TYPE_CHECKING:
    from feast import FeatureStore

    from qarm_feast.codebook_config import CodebookConfig
    from qarm_feast.registry import GateReading, Manifest

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
_DIFF_WIDTH = 28
_LIST_HEAD = (
    "version", "state", "parent", "encoder", "levels", "pool", "search", "cap", "forced",
    "created (UTC)",
)  # fmt: skip


def _legal_name(_: click.Context, __: click.Parameter, name: str | None) -> str | None:
    from qarm_feast.registry import check_version_name

    return None if name is None else check_version_name(name)


def _version_option(command: CommandT) -> CommandT:
    return click.option(
        "--codebook-version",
        "version",
        required=True,
        callback=_legal_name,
        help="Name of the version, like v1.",
    )(command)


@click.group(
    "codebook",
    epilog="Example: qarm codebook train --config feature_repo/qarm.yaml --codebook-version v1",
)
def codebook_group() -> None:
    """Train, evaluate, publish and list codebook versions."""


@codebook_group.command(epilog="Example: qarm codebook train --codebook-version v2 --parent v1")
@config_option
@log_level_option
@_version_option
@click.option(
    "--parent",
    callback=_legal_name,
    help="Published version whose codes are kept as far as they can be.",
)
def train(config_path: str, log_level: str | None, version: str, parent: str | None) -> None:
    """Train a version on the exported vectors of items with a train row."""
    from qarm_feast.codebook_jobs import train_codebook

    start_logging(config_path, log_level)
    manifest = train_codebook(config_path, version, datetime.now(UTC), parent)
    is_fsq = " (the last FSQ)" if manifest.kinds[-1] == "fsq" else ""
    click.echo(
        f"trained {version}: {manifest.num_training_items} items, RQ levels "
        f"{' x '.join(map(str, manifest.level_sizes))}{is_fsq}, VQ pool {manifest.pool_size} "
        f"(top {manifest.num_neighbors}), encoder {manifest.encoder_version}"
    )
    if manifest.parent is not None:
        click.echo(_continuity_line(manifest.parent, manifest.continuity))


@codebook_group.command(epilog="Example: qarm codebook evaluate --codebook-version v1")
@config_option
@log_level_option
@_version_option
def evaluate(config_path: str, log_level: str | None, version: str) -> None:
    """Measure a version on all exported vectors; writes quality.json and quality.html."""
    from qarm_feast.codebook_evaluation import evaluate_codebook

    start_logging(config_path, log_level)
    evaluation = evaluate_codebook(config_path, version)
    click.echo(_quality_table(evaluation.quality))
    click.echo(_gates_table(evaluation.gates))
    for refusal in evaluation.manifest.forced_gates:
        click.echo(f"published by force against a gate: {refusal}")
    click.echo(f"page to look at: {evaluation.page_path}")
    click.echo(f"written to {evaluation.report_path}")


@codebook_group.command(epilog="Example: qarm codebook publish --codebook-version v1")
@config_option
@log_level_option
@_version_option
@click.option("--force", is_flag=True, help="Publish against a gate; the manifest says so.")
def publish(config_path: str, log_level: str | None, version: str, force: bool) -> None:
    """Publish an evaluated version that keeps the gates; a first one becomes the default.

    Later ones are staged: `qarm rollout start` takes them to the default, step by step.

    With codebook.max_items_per_code, items beyond the cap move first, and the gates look at the
    figures of the codes as they are served.
    """
    from qarm_feast.codebook_config import CodebookConfig
    from qarm_feast.codebook_release import publish_version
    from qarm_feast.registry import CodebookRegistry, VersionState, read_manifest

    start_logging(config_path, log_level)
    uri = load_section(config_path, "codebook", CodebookConfig).uri
    is_new = version not in CodebookRegistry(uri).states()
    state = publish_version(config_path, version, force=force)
    done = f"published {version} as" if is_new else f"{version} was published before and stays"
    click.echo(f"{done} {state.value} in {uri}")
    manifest = read_manifest(uri, version)
    for refusal in manifest.forced_gates:
        click.echo(f"forced against a gate: {refusal}")
    if manifest.forced_gates and not manifest.caps:
        # A capped version was measured as served: its report is of the publication already.
        command = f"qarm codebook evaluate --codebook-version {version}"
        click.echo(f"its report is still that of the draft; `{command}` writes it there too")
    if manifest.caps:
        click.echo(_caps_line(manifest.caps))
    if state is VersionState.STAGED:
        click.echo(f"next: `qarm rollout plan --codebook-version {version}`")


@codebook_group.command("list", epilog="Example: qarm codebook list")
@config_option
def list_versions(config_path: str) -> None:
    """List all versions with their states; `forced` counts the gates that --force overruled."""
    from qarm_feast.codebook_config import CodebookConfig
    from qarm_feast.registry import (
        CodebookRegistry,
        VersionState,
        drafts_uri,
        read_manifest,
        stored_versions,
    )

    uri = load_section(config_path, "codebook", CodebookConfig).uri
    states = CodebookRegistry(uri).states()
    purged = [version for version, state in states.items() if state is VersionState.PURGED]
    rows = [
        (state.value, read_manifest(uri, version))
        for version, state in states.items()
        if version not in purged
    ]
    drafts = drafts_uri(uri)
    rows += [("draft", read_manifest(drafts, version)) for version in stored_versions(drafts)]
    lines = [_LIST_HEAD, *(_list_line(state, manifest) for state, manifest in rows)]
    lines += [(version, VersionState.PURGED.value) for version in purged]
    click.echo(_aligned(lines))


@codebook_group.command(epilog="Example: qarm codebook show --codebook-version v1")
@config_option
@_version_option
def show(config_path: str, version: str) -> None:
    """Print a version's manifest as JSON."""
    from qarm_feast.codebook_config import CodebookConfig
    from qarm_feast.registry import read_manifest, trained_uri

    uri = load_section(config_path, "codebook", CodebookConfig).uri
    manifest = read_manifest(trained_uri(uri, version), version)
    click.echo(manifest.model_dump_json(indent=2))
    for refusal in manifest.forced_gates:
        # Beside the JSON, where one who reads a screen of it does not miss it.
        click.echo(f"{version} was published by force against a gate: {refusal}", err=True)


@codebook_group.command(epilog="Example: qarm codebook retire --codebook-version v1")
@config_option
@log_level_option
@_version_option
def retire(config_path: str, log_level: str | None, version: str) -> None:
    """Retire a version: no view, no worker and no new service uses it any more.

    `qarm rollout finish` does it as the last step of a rollout, and waits for the workers.
    """
    from qarm_feast.codebook_config import CodebookConfig
    from qarm_feast.registry import CodebookRegistry, VersionState

    start_logging(config_path, log_level)
    uri = load_section(config_path, "codebook", CodebookConfig).uri
    CodebookRegistry(uri).set_state(version, VersionState.RETIRED)
    click.echo(f"retired {version} in {uri}")


@codebook_group.command(epilog="Example: qarm codebook default --codebook-version v2")
@config_option
@log_level_option
@_version_option
def default(config_path: str, log_level: str | None, version: str) -> None:
    """Make a staged or live version the default; the default before it becomes live.

    New feature services are made from the default. This changes the state only: no row of an
    earlier item is written. `qarm rollout start` fills the version's view up first, compares it
    with the old one, and can be undone.
    """
    from qarm_feast.codebook_config import CodebookConfig
    from qarm_feast.registry import CodebookRegistry, VersionState

    start_logging(config_path, log_level)
    uri = load_section(config_path, "codebook", CodebookConfig).uri
    CodebookRegistry(uri).set_state(version, VersionState.DEFAULT)
    click.echo(f"{version} is the default of {uri}")


def _offsets(
    _: click.Context, __: click.Parameter, texts: tuple[str, ...]
) -> dict[tuple[str, int], int]:
    ends = {}
    for text in texts:
        parts = text.split(":")
        if len(parts) != 3 or not (parts[0] and all(map(str.isdecimal, parts[1:]))):
            raise click.BadParameter(
                f"{text!r} is not TOPIC:PARTITION:OFFSET, like item-events:0:1200"
            )
        ends[parts[0], int(parts[1])] = int(parts[2])
    return ends


@codebook_group.command(epilog="Example: qarm codebook backfill --codebook-version v2 --engine ray")
@config_option
@log_level_option
@_version_option
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray: Ray Data, on this machine's cores or the cluster of RAY_ADDRESS.",
)
@click.option(
    "--up-to",
    "up_to",
    multiple=True,
    metavar="TOPIC:PARTITION:OFFSET",
    callback=_offsets,
    help="Leave events of a partition from this offset on to the workers; may be repeated.",
)
def backfill(
    config_path: str,
    log_level: str | None,
    version: str,
    engine: Literal["local", "ray"],
    up_to: dict[tuple[str, int], int],
) -> None:
    """Write a version's codes of all logged content events and all catalogue items.

    Offline every event gets a row at its own time; online an item's newest row wins, also over
    those that workers write meanwhile. A backfill that was stopped goes on where it was.
    """
    from qarm_feast.backfill import backfill_codes, check_partitions

    start_logging(config_path, log_level)
    if up_to:
        check_partitions(config_path, up_to)
    counts = backfill_codes(config_path, version, up_to=up_to, engine=engine)
    click.echo(
        f"backfilled {version}: {counts.num_code_rows} rows of codes ({counts.num_requantized} "
        f"from stored vectors, {counts.num_reencoded} from content, {counts.num_deleted} "
        f"takedowns), {counts.num_online_changes} newer than what was online"
    )
    for reason, count in sorted(counts.num_refused.items()):
        click.echo(f"without codes: {count} ({reason}); the log names the first of each piece")
    if counts.num_damaged_parts:
        click.echo(f"{counts.num_damaged_parts} damaged parts left out; see `qarm offline status`")


@codebook_group.command(epilog="Example: qarm codebook purge --codebook-version v1 --yes")
@config_option
@log_level_option
@_version_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(config_path: str, log_level: str | None, version: str, yes: bool) -> None:
    """Remove a retired version, its report and its online rows for good. THIS CANNOT BE UNDONE.

    Online rows go at most codebook.purge_rows_per_second at a time; a purge that was killed goes
    on when it is run again. Offline rows stay, but nothing can make or decode such codes any more,
    and no version can be refreshed from this one. The name stays taken. A draft that was never
    published is removed as well, and its name is free again.
    """
    from qarm_feast.codebook_config import CodebookConfig
    from qarm_feast.registry import CodebookRegistry

    start_logging(config_path, log_level)
    config = load_section(config_path, "codebook", CodebookConfig)
    registry = CodebookRegistry(config.uri)
    registry.check_purgeable(version)
    # Opened before anything is removed: a repository that cannot be read or holds a store that
    # gives no rows away is told while the version is still there.
    feature_store = _purged_store(config_path) if version in registry.states() else None
    question = f"Remove codebook version {version} from {config.uri} for good? This cannot be"
    if not (yes or click.confirm(f"{question} undone")):
        click.echo(f"kept {version}")
        return
    removed = registry.purge(version)
    click.echo(f"purged {version}: " + (", ".join(map(str, removed)) or "no file was left"))
    if version in registry.states():
        click.echo(_purge_rows(feature_store, config, version))


@codebook_group.command(epilog="Example: qarm codebook diff --codebook-version v2 --against v1")
@config_option
@log_level_option
@_version_option
@click.option(
    "--against", required=True, callback=_legal_name, help="The version to compare with, like v1."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
def diff(
    config_path: str, log_level: str | None, version: str, against: str, as_json: bool
) -> None:
    """Compare two versions: settings, labels that go on, pool rows, codes and quality."""
    from qarm_feast.codebook_release import diff_versions

    start_logging(config_path, log_level)
    changes = diff_versions(config_path, version, against)
    click.echo(json.dumps(changes, indent=2) if as_json else _diff_table(changes))


def _purged_store(config_path: str) -> "FeatureStore | None":
    """Return the repository beside the configuration, one whose online store is ours, if any."""
    from qarm_feast.online_stores import code_online_store
    from qarm_feast.repo_paths import open_feature_store

    repo_dir = Path(config_path).resolve().parent
    if not (repo_dir / "feature_store.yaml").is_file():
        return None
    feature_store = open_feature_store(repo_dir)
    code_online_store(feature_store)
    return feature_store


def _purge_rows(
    feature_store: "FeatureStore | None", config: "CodebookConfig", version: str
) -> str:
    """Delete the online rows of a purged version, and return the line that tells of it."""
    from qarm_feast.purge import purge_online_rows

    if feature_store is None:
        return "online rows: none looked for, no feature_store.yaml stands beside the configuration"
    mark = purge_online_rows(feature_store, config.uri, version, config.purge_rows_per_second)
    return f"online rows: {mark.num_rows} removed, of {mark.num_items} items in the offline log"


def _list_line(state: str, manifest: "Manifest") -> tuple[str, ...]:
    return (
        manifest.version,
        state,
        manifest.parent or "-",
        manifest.encoder_version,
        "x".join(map(str, manifest.level_sizes)),
        str(manifest.pool_size),
        manifest.search,
        str(manifest.caps.get("max_items_per_code", "-")),
        str(len(manifest.forced_gates) or "-"),
        f"{manifest.created.astimezone(UTC):%Y-%m-%d %H:%M}",
    )


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells in columns as wide as their widest cell."""
    widths = [max(map(len, filter(None, column))) for column in zip_longest(*lines)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)).rstrip()
        for line in lines
    )


def _caps_line(caps: Mapping[str, Any]) -> str:
    before, after = caps["without_caps"], caps["with_caps"]
    # Versions of a time when it was not measured with and without the cap are told with "-".
    hr10_before, hr10_after = _text(before.get("hr10")), _text(after.get("hr10"))
    churn = caps.get("churn")
    change = f"; as served {churn['full']:.1%} of full codes changed since then" if churn else ""
    return (
        f"at most {caps['max_items_per_code']} items per code: {caps['num_moved']} moved, "
        f"{caps['num_without_room']} found no free code, {caps['num_held']} hold a code of the "
        f"parent{change}; collision rate {before['collision_rate']:.4f} -> "
        f"{after['collision_rate']:.4f}, HR@10 {hr10_before} -> {hr10_after}, "
        f"largest bucket {before['max_bucket']} -> {after['max_bucket']}"
    )


def _diff_table(changes: Mapping[str, Any]) -> str:
    versions = (changes["version"], changes["against"])
    compared = changes["manifest"] | changes["quality"]
    lines = [_diff_line("", versions)]
    for name, values in compared.items():
        texts = [_text(value) for value in values]
        if max(map(len, texts)) < _DIFF_WIDTH:
            lines.append(_diff_line(name, texts))
        else:
            lines.append(name)
            lines += [f"  {version}: {text}" for version, text in zip(versions, texts, strict=True)]
    pool = changes["pool"]
    lines += [
        "",
        f"pool rows: {pool['num_kept']} keep their item, {pool['num_reset']} start anew "
        f"(of {pool['num_rows']}; {changes['against']} has {pool['num_rows_against']})",
        _labels_line(changes),
        _catalogue_line(changes["catalogue"]),
    ]
    return "\n".join(lines)


def _diff_line(name: str, texts: Sequence[str]) -> str:
    return f"{name:<{_DIFF_WIDTH}}" + "".join(f"{text:>{_DIFF_WIDTH}}" for text in texts)


def _labels_line(changes: Mapping[str, Any]) -> str:
    if changes["labels"] == "number":
        return (
            f"labels: no label map leads from {changes['version']} to {changes['against']}; codes "
            "are compared by their numbers"
        )
    going_on = ", ".join(f"{kept}/{size}" for kept, size in changes["codes_that_go_on"])
    return f"labels: codes that go on from {changes['against']}, level by level: {going_on}"


def _catalogue_line(catalogue: Mapping[str, Any] | None) -> str:
    if catalogue is None:
        return "items: not compared, the vectors of an encoder are missing (`qarm align export`)"
    churn = catalogue["rq_churn"]
    levels = ", ".join(f"{share:.1%}" for share in churn["levels"])
    prefixes = ", ".join(f"{share:.1%}" for share in churn["prefixes"])
    return (
        f"items: of {catalogue['num_compared']} with equal content (of {catalogue['num_items']}) "
        f"{churn['full']:.1%} changed their full RQ code, levels {levels}, prefixes {prefixes}; "
        f"{catalogue['vq_churn']:.1%} their VQ code"
    )


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "-"
    return f"{value:.5g}" if isinstance(value, float) else "-" if value is None else str(value)


def _continuity_line(parent: str, figures: Mapping[str, Any]) -> str:
    kept, naive = figures["churn"], figures["naive_churn"]
    mse_change = figures["quantization_mse"] / figures["naive_quantization_mse"] - 1
    return (
        f"kept from {parent}: of {figures['num_items']['compared']} items "
        f"{kept['full']:.1%} changed their full code (naive refit {naive['full']:.1%}), level 1 "
        f"{kept['levels'][0]:.1%} ({naive['levels'][0]:.1%}), pool rows "
        f"{figures['pool']['churn']:.1%} ({figures['pool']['naive_churn']:.1%})"
        f"{_lists_part(figures)}; MSE {mse_change:+.1%} against the naive refit"
    )


def _lists_part(figures: Mapping[str, Any]) -> str:
    # Versions from before lists were kept do not say.
    lists = figures.get("lists")
    if lists is None:
        return ""
    return f", VQ lists {lists['churn']:.1%} (nearest alone {lists['naive_churn']:.1%})"


def _quality_table(quality: Mapping[str, Any]) -> str:
    lines = [f"{'level':<6}{'used':>12}{'perplexity':>12}{'largest':>9}{'gini':>7}{'residual':>10}"]
    for number, level in enumerate(quality["levels"], start=1):
        used = f"{level['num_used']}/{level['codebook_size']}"
        lines.append(
            f"{number:<6}{used:>12}{level['perplexity']:>12.1f}{level['largest_bucket']:>9}"
            f"{level['gini']:>7.3f}{level['relative_residual_norm']:>10.3f}"
        )
    cosines = ", ".join(
        "-" if cosine is None else f"{cosine:.3f}"
        for cosine in quality["mean_cosine_by_shared_prefix"]
    )
    lines += [
        f"items {quality['num_items']}, distinct full codes {quality['num_unique_codes']}, "
        f"collision rate {quality['collision_rate']:.4f}, singletons "
        f"{quality['singleton_share']:.4f}, largest bucket {quality['max_bucket']}, "
        f"items per shared code {quality['mean_items_per_shared_code']:.2f}",
        f"HR@1 {quality['hr1']:.4f}, HR@10 {quality['hr10']:.4f}, "
        f"MSE {quality['quantization_mse']:.3e}",
        f"mean cosine by shared levels (0, 1, ...): {cosines}",
        f"behavioural neighbours of the test period that share c1, c1c2, ...: "
        f"{_behaviour_text(quality['behaviour'])}",
        f"VQ pool rows used {quality['vq']['num_used']}/{quality['vq']['codebook_size']}, "
        f"mean cosine of first neighbour {quality['vq']['mean_cosine_first']:.3f}, "
        f"of all {quality['vq']['mean_cosine_all']:.3f}",
    ]
    return "\n".join(lines)


def _gates_table(readings: Sequence["GateReading"]) -> str:
    """Return a line per gate: what it measured, its limit, and by how much it is kept or missed."""
    lines = []
    for reading in readings:
        verdict = "no limit (gate off)"
        if reading.limit is not None:
            kept = "missed" if reading.missed_by > 0 else "kept"
            distance = abs(reading.value - reading.limit)
            verdict = f"limit {reading.limit:.4f}, {kept} by {distance:.4f}"
        lines.append(f"gate {reading.name:<28}measured {reading.value:.4f}, {verdict}")
    num_missed = sum(reading.missed_by > 0 for reading in readings)
    answer = f"refused ({num_missed} missed)" if num_missed else "accepted"
    return "\n".join([*lines, f"by these figures a publication is {answer}"])


def _behaviour_text(behaviour: Mapping[str, Any]) -> str:
    if not behaviour["levels"]:
        return "there are none"
    levels = ", ".join(
        f"{level['share']:.4f} (chance {level['chance']:.4f})" for level in behaviour["levels"]
    )
    return f"{levels}; {behaviour['num_pairs']} pairs"
