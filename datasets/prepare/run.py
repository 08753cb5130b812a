"""One preparation from start to end: options, annotations, archives, videos, frames, report, lists."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from common.console import log_lines
from datasets.decoders import PACKAGES, Decoder
from datasets.prepare.annotation_files import AnnotationFileMissing, AnnotationFiles
from datasets.prepare.archives import find_archives, unpack
from datasets.prepare.catalogue import Catalogue, match, scan
from datasets.prepare.decode import FrameSettings, FrameStore, Outcome, probe
from datasets.prepare.extract import check_names, extract_all, inspect_all
from datasets.prepare.formats import FORMATS
from datasets.prepare.formats.folder import Grouping, identical_across_splits
from datasets.prepare.formats.folder import read as read_folder
from datasets.prepare.frame_folders import count_frames
from datasets.prepare.output_dir import UNPACKED, OutputDir, Settings, write_labels, write_rows
from datasets.prepare.plan import SPLITS, Entry, Plan, PrepareError
from datasets.prepare.report import Report, make_report, write_snippet

ANNOTATION_SUFFIXES = frozenset((".txt", ".csv", ".json"))
EXAMPLES = 5  # missing videos in a message
LOOSE = "loose"  # link to --videos beside the folders of its unpacked archives

logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class Options:
    """What to prepare, and how."""

    dataset: str  # a name of FORMATS, or `folder`
    videos: Path
    out: Path
    annotations: Path | None = None
    split: int = 1  # number of the published split
    splits: tuple[str, ...] | None = None  # of train, val and test; None: all that have published labels
    frames: FrameSettings | None = FrameSettings()  # None: the videos are used as they are
    decoder: Decoder = "pyav"
    jobs: int = 2  # processes
    allow_missing: bool = False
    new_split: bool = False  # the lists of an earlier run may be replaced by others
    grouping: Grouping = field(default_factory=Grouping)  # how `folder` splits the videos

    def check(self) -> None:
        """Raises PrepareError for a value that no run can use."""
        if self.jobs < 1:
            raise PrepareError(f"--jobs must be positive, not {self.jobs}")
        for option, path in (("--videos", self.videos), ("--annotations", self.annotations)):
            if path is not None and not path.exists():
                raise PrepareError(f"{option} {path}: there is no such file or folder")
        if self.out.exists() and self.out.samefile(self.videos):
            raise PrepareError(
                f"--out must not be the videos' folder {self.videos}; a folder inside it or around it is fine"
            )
        if self.frames and self.frames.short_side < 0:
            raise PrepareError(
                f"--short-side must be positive, or 0 for the video's own size, not {self.frames.short_side}"
            )
        if self.frames and not 1 <= self.frames.quality <= 100:
            raise PrepareError(f"--quality must be between 1 and 100, not {self.frames.quality}")
        package = PACKAGES[self.decoder]
        if importlib.util.find_spec(package) is None:
            raise PrepareError(f"--decoder {self.decoder} needs the package {package}: pip install {package}")
        if self.dataset == "folder":
            self.grouping.check()
            return
        form = FORMATS[self.dataset]
        if not 1 <= self.split <= form.num_splits:
            has = f"splits 1 to {form.num_splits}" if form.num_splits > 1 else "one split"
            raise PrepareError(f"--split {self.split}: {form.title} has {has}")
        if self.annotations is None:
            raise PrepareError(f"{self.dataset} needs --annotations, the folder of {form.title}'s annotation files")

    def settings(self) -> Settings:
        """What the output folder must agree with."""
        return Settings(self.dataset, self.decoder, asdict(self.frames) if self.frames else None)

    def split_settings(self, plan: Plan) -> dict[str, object]:
        """How the plan divides its videos, named as the options."""
        if self.dataset != "folder":
            settings = {"split": self.split} if FORMATS[self.dataset].num_splits > 1 else {}
        elif plan.split_folders:
            settings = {"split_folders": list(plan.split_folders)}
        else:
            settings = self.grouping.settings()
        return settings | {"classes": len(plan.classes)}


def prepare(options: Options) -> Report:
    """Prepare a dataset; the lists are written last.

    Raises:
        PrepareError: something that the user can correct; finished work stays, and no list is written.
        OSError: the disk is full or fails.
    """
    options.check()
    with OutputDir(options.out, options.settings()) as output_dir:
        plan, catalogue = _survey(options, output_dir)
        found, missing = match(plan, catalogue)
        store = FrameStore(options.out, options.frames) if options.frames and not plan.frame_names else None
        if store is not None:
            check_names(store, catalogue.root, sorted(found.values()))
        split = options.split_settings(plan)
        if not options.new_split:
            output_dir.check_split(split, _labels(found))
        output_dir.lock()
        notes, passed_over = _notes(options, plan, catalogue)
        if missing and not options.allow_missing:
            if not output_dir.has_lists():
                make_report(plan, split, found, missing, {}).write(options.out)
            raise _missing_error(options, plan, catalogue.root, missing, output_dir)
        if missing:
            logger.warning("%d of %d videos of %s are missing", len(missing), len(plan.entries), plan.title)
        output_dir.replace_lists(split)
        outcomes, num_before = _read_videos(options, plan, catalogue.root, sorted(found.values()), store)
        report = make_report(plan, split, found, missing, outcomes)
        report.extracted_before, report.notes, report.passed_over = num_before, notes, passed_over
        if options.dataset == "folder" and not plan.frame_names:
            report.identical_across_splits = _identical_videos(catalogue.root, found, outcomes)
        report.write(options.out)
        log_lines(logger, report.table())
        _check_usable(report, options)
        _write_lists(options, plan, catalogue.root, split, found=found, outcomes=outcomes, store=store)
    return report


def _labels(found: Mapping[Entry, str]) -> dict[str, tuple[str, int]]:
    """Video, by its file and by its frames -> (split, label)."""
    names = ((name, entry) for entry, path in found.items() for name in (path, os.path.splitext(path)[0]))
    return {name: (entry.split, entry.label) for name, entry in names}


def _read_videos(
    options: Options, plan: Plan, videos: Path, paths: Sequence[str], store: FrameStore | None
) -> tuple[dict[str, Outcome], int]:
    """Extract, open or count all videos; outcomes, and the number of those that an earlier run had extracted."""
    if store is not None:
        return extract_all(store, videos, paths, options.jobs)
    if plan.frame_names:
        inspect = partial(count_frames, names=plan.frame_names)
    else:
        inspect = partial(probe, decoder=options.decoder)
    return inspect_all(videos, paths, inspect, options.jobs), 0


def _identical_videos(
    videos: Path, found: Mapping[Entry, str], outcomes: Mapping[str, Outcome]
) -> list[tuple[str, str]]:
    paths: dict[str, list[str]] = {split: [] for split in SPLITS}
    for entry, path in found.items():
        if not outcomes[path].error:
            paths[entry.split].append(path)
    return identical_across_splits(videos, paths)


def _notes(options: Options, plan: Plan, catalogue: Catalogue) -> tuple[list[str], list[str]]:
    """Say how classes and splits were chosen and, of class folders, what is not taken; these notes, and the files."""
    notes, files = list(plan.notes), []
    if options.dataset == "folder":
        counts, files = catalogue.passed_over()
        notes += [f"passed over: {counts}, such as {files[0]}"] if files else []
    for note in notes:
        logger.info("%s", note)
    return notes, files


def _survey(options: Options, output_dir: OutputDir) -> tuple[Plan, Catalogue]:
    """Read the annotations, before any archive of videos is unpacked, then list the videos."""
    if options.dataset == "folder":
        if options.annotations is not None:
            logger.warning("--annotations %s: folder reads none", options.annotations)
        catalogue = _list_videos(options, output_dir, None)
        plan = read_folder(catalogue, options.grouping, options.out.absolute().name)
        _check_frames(options, plan)
    else:
        plan = _read_annotations(options, output_dir)
        _check_frames(options, plan)
        catalogue = _list_videos(options, output_dir, plan)
    plan.check()
    return plan, catalogue


def _check_frames(options: Options, plan: Plan) -> None:
    if plan.frame_names and options.frames is None:
        raise PrepareError(f"--videos-only: {plan.title} comes as frames, not as videos")
    if plan.frame_names and options.frames.storage == "zips":
        raise PrepareError(f"--pack: {plan.title} comes as frames; `python -m datasets.packed_frames` packs them")


def _read_annotations(options: Options, output_dir: OutputDir) -> Plan:
    """Read the plan. Archives are unpacked, the smallest first, until no annotation file is missing."""
    form, source = FORMATS[options.dataset], options.annotations
    unpacked = options.out / UNPACKED / "annotations"
    archives = find_archives(source, skip=options.out)
    archives.sort(key=lambda archive: archive.size)
    for archive in archives if archives and source.is_file() else [None, *archives]:
        if archive is not None:
            output_dir.lock()
            unpack([archive], unpacked, ANNOTATION_SUFFIXES)
        files = AnnotationFiles(source, form.title, unpacked=unpacked if archive else None)
        try:
            return form.read(files, options.split, options.splits)
        except AnnotationFileMissing as error:
            missing = error
    raise missing


def _list_videos(options: Options, output_dir: OutputDir, plan: Plan | None) -> Catalogue:
    """List the videos in --videos and, if one of the plan's is not among them, those in archives there.

    Without a plan (`folder`) archives count only if no video lies beside them. If both kinds are needed, what lies in
    --videos is linked to beside what was unpacked, so that one folder holds all videos of the lists.
    """
    source, takes_frames = options.videos, None if plan is None else plan.frame_names is not None
    archives = find_archives(source, skip=options.out)
    if source.is_file() and not archives:
        raise PrepareError(f"--videos {source}: is neither a folder nor an archive of a known kind")
    loose = None if source.is_file() else scan(source, takes_frames, skip=options.out)
    if not archives or (loose and plan and not _missing(plan, loose)):
        return loose
    if plan is None and loose and loose.paths():
        logger.warning("--videos %s: %s is not unpacked, as videos lie beside it", source, archives[0])
        return loose
    output_dir.lock()
    unpacked = options.out / UNPACKED / "videos"
    link = unpacked / LOOSE
    if link.is_symlink():
        link.unlink()
    unpack(archives, unpacked)
    catalogue = scan(unpacked, takes_frames)
    if loose and plan and len(_missing(plan, catalogue)) == len(plan.entries):
        return loose  # the archives hold something else
    if loose and plan and any(loose.find(entry) for entry in _missing(plan, catalogue)):
        link.symlink_to(source.absolute(), target_is_directory=True)
        return scan(unpacked, takes_frames, skip=options.out)
    return catalogue


def _missing(plan: Plan, catalogue: Catalogue) -> list[Entry]:
    return [entry for entry in plan.entries if catalogue.find(entry) is None]


def _missing_error(
    options: Options, plan: Plan, videos: Path, missing: Sequence[Entry], output_dir: OutputDir
) -> PrepareError:
    """Names some of the missing videos and, unless it belongs to the lists of an earlier run, the report."""
    listed = "" if output_dir.has_lists() else f"{options.out / 'report.txt'} lists them, "
    names = [entry.name for entry in missing[:EXAMPLES]]
    return PrepareError(
        f"{len(missing)} of {len(plan.entries)} videos of {plan.title} are missing below {videos}, such as "
        f"{', '.join(names)}: nothing was extracted; {listed}--allow-missing continues without them"
    )


def _check_usable(report: Report, options: Options) -> None:
    """Warn of empty splits; raises PrepareError if all are empty, or for unreadable videos without --allow-missing."""
    if report.unreadable and not options.allow_missing:
        name, reason = report.unreadable[0]
        found = sum(counts.found for counts in report.splits.values())
        raise PrepareError(
            f"{len(report.unreadable)} of {found} videos cannot be read, such as {name} ({reason}), so no list is written; "
            f"{options.out / 'report.txt'} lists them, --allow-missing continues without them"
        )
    empty = [split for split, counts in report.splits.items() if counts.found == counts.unreadable]
    for split in empty:
        counts = report.splits[split]
        reasons = {"missing": counts.missing, "unreadable": counts.unreadable}
        reason = " or ".join(reason for reason, count in reasons.items() if count)
        logger.warning("%s: all of its %d videos are %s: no %s.txt", split, counts.listed, reason, split)
    if len(empty) == len(report.splits):
        raise PrepareError(f"no video of {report.dataset} can be read; {options.out / 'report.txt'} says why")


def _write_lists(
    options: Options,
    plan: Plan,
    videos: Path,
    split: dict[str, object],
    *,
    found: Mapping[Entry, str],
    outcomes: Mapping[str, Outcome],
    store: FrameStore | None,
) -> None:
    """Write labels, the lists that have rows and, last, the snippet. `store` has the frames; None: the videos are used."""
    out = options.out
    write_labels(out / "labels.csv", plan.classes)
    rows: dict[str, list[Sequence[object]]] = {name: [] for name in plan.splits}
    for entry, path in found.items():
        outcome = outcomes[path]
        if outcome.error:
            continue
        name = store.name_of(path) if store else path
        with_frames = store is not None or plan.frame_names is not None
        rows[entry.split].append((name, outcome.frames, entry.label) if with_frames else (name, entry.label))
    listed_splits = [name for name, split_rows in rows.items() if split_rows]
    for name in listed_splits:
        write_rows(out / f"{name}.txt", rows[name])
    snippet = write_snippet(
        out,
        plan,
        split=split,
        listed_splits=listed_splits,
        root=os.path.abspath(store.root if store else videos),
        extracted=store is not None,
        decoder=options.decoder,
    )
    logger.info("%s:", out / "config_snippet.yaml")
    log_lines(logger, snippet)
