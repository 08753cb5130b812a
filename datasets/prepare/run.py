"""One preparation from start to end: annotations, archives, videos, frames, report, lists.

Lives here: the order of the steps, and when a run may not end in lists. Does not live here: any of the steps.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets.decoders import Decoder
from datasets.prepare.archives import find_archives, unpack
from datasets.prepare.catalogue import Catalogue, match, scan
from datasets.prepare.decode import Outcome
from datasets.prepare.extract import FrameStore, extract_all, look_at_all
from datasets.prepare.formats import FORMATS
from datasets.prepare.formats.folder import Grouping, identical_across_sides
from datasets.prepare.formats.folder import read as read_folder
from datasets.prepare.lists import PrepareError, write_labels, write_rows
from datasets.prepare.owners import AbsentError, Owners
from datasets.prepare.plan import Entry, Plan
from datasets.prepare.report import Report, make_report
from datasets.prepare.snippet import write_snippet
from datasets.prepare.workplace import UNPACKED, Use, workplace

DECODERS = {"decord": "decord", "pyav": "av"}  # and the package that each needs
ANNOTATION_SUFFIXES = frozenset((".txt", ".csv", ".json"))
LOOSE = "loose"  # a link to --videos among the folders that its archives became

logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class Options:
    """What to prepare. `frames`: extract JPEGs; otherwise the videos stay as they are. Sizes in pixels."""

    dataset: str  # a name of FORMATS, or `folder`
    videos: Path
    out: Path
    annotations: Path | None = None
    split: int = 1
    splits: tuple[str, ...] | None = None  # None: all that the owners publish with labels
    frames: bool = True
    short_side: int = 256  # 0: as in the video
    quality: int = 90
    decoder: Decoder = "decord"
    jobs: int = 2
    allow_missing: bool = False
    grouping: Grouping = field(default_factory=Grouping)

    def check(self) -> None:
        """Raises PrepareError for values that no run could use."""
        if self.jobs < 1:
            raise PrepareError(f"--jobs must be positive, not {self.jobs}")
        if _same(self.out, self.videos):
            raise PrepareError(
                f"--out must not be the videos' folder {self.videos}; a folder inside it or around it may be"
            )
        if self.short_side < 0:
            raise PrepareError(f"--short-side must be positive, or 0 for the video's own, not {self.short_side}")
        if not 1 <= self.quality <= 100:
            raise PrepareError(f"--quality must lie between 1 and 100, not be {self.quality}")
        if importlib.util.find_spec(DECODERS[self.decoder]) is None:
            package = DECODERS[self.decoder]
            raise PrepareError(f"--decoder {self.decoder} needs the package {package}: pip install {package}")
        if self.dataset == "folder":
            self.grouping.check()
            return
        form = FORMATS[self.dataset]
        if not 1 <= self.split <= form.numbered_splits:
            has = f"splits 1 to {form.numbered_splits}" if form.numbered_splits > 1 else "one split"
            raise PrepareError(f"--split {self.split}: {form.title} has {has}")
        if self.annotations is None:
            raise PrepareError(f"{self.dataset} needs --annotations, the folder of {form.title}'s annotation files")

    def numbered_split(self) -> int | None:
        """The owners' split, None where there is but one."""
        form = FORMATS.get(self.dataset)
        return self.split if form and form.numbered_splits > 1 else None

    def lists(self) -> tuple[int, tuple[str, ...] | None]:
        """Which of the owners' lists: number of the split, and sides."""
        return self.split, self.splits

    def use(self) -> Use:
        """What the output folder is for."""
        frames = {"short_side": self.short_side, "quality": self.quality, "decoder": self.decoder}
        return Use(self.dataset, self.numbered_split(), self.decoder, frames if self.frames else None)


def prepare(options: Options) -> Report:
    """Prepares a dataset; see the module for the files.

    Raises:
        PrepareError: anything that a user can mend; what is finished stays, and no list is written.
        OSError: the disk is full or fails.
    """
    options.check()
    with workplace(options.out, options.use()) as place:
        plan, catalogue = _survey(options)
        plan.check()
        found, missing = match(plan, catalogue)
        report = make_report(plan, options.numbered_split(), found, missing, {})
        if missing and not options.allow_missing:
            report.write(options.out)
            raise PrepareError(
                f"{len(missing)} of {len(plan.entries)} videos of {plan.title} are missing below {catalogue.root}, such "
                f"as {missing[0].names[0]}: nothing was extracted; {options.out / 'report.txt'} names them, "
                "--allow-missing goes on without them"
            )
        if missing:
            logger.warning("%d of %d videos of %s are missing", len(missing), len(plan.entries), plan.title)
        store = FrameStore(options.out, options.short_side, options.quality, options.decoder)
        paths = sorted(found.values())
        extracted_before = 0
        if options.frames and not plan.published_frames:
            store.check_apart(catalogue.root, paths)
        place.begin()
        if options.frames and not plan.published_frames:
            outcomes, extracted_before = extract_all(store, catalogue.root, paths, options.jobs)
        else:
            store = None
            outcomes = look_at_all(
                catalogue.root, paths, None if plan.published_frames else options.decoder, options.jobs
            )
        report = make_report(plan, options.numbered_split(), found, missing, outcomes)
        report.extracted_before = extracted_before
        if options.dataset == "folder":
            sides = ([p for e, p in found.items() if e.split == side] for side in ("train", "val"))
            report.identical_across_sides = identical_across_sides(catalogue.root, *sides)
        report.write(options.out)
        logger.info("%s", report.table())
        _require_complete(report, options)
        _write_lists(options, plan, catalogue.root, found, outcomes, store)
    return report


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _survey(options: Options) -> tuple[Plan, Catalogue]:
    """Reads the annotations before any archive of videos is unpacked, then lists the videos."""
    if options.dataset == "folder":
        if options.annotations is not None:
            logger.warning("--annotations %s: folder reads none", options.annotations)
        catalogue = _scan(options, None)
        return read_folder(catalogue, options.grouping, options.out.absolute().name), catalogue
    plan = _read_annotations(options)
    if plan.published_frames and not options.frames:
        raise PrepareError(f"--videos-only: {plan.title} is published as frames, not as videos")
    return plan, _scan(options, plan)


def _read_annotations(options: Options) -> Plan:
    """The plan; archives are unpacked, the smallest first, only until no annotation file is missing."""
    form, source = FORMATS[options.dataset], options.annotations
    target = options.out / UNPACKED / "annotations"
    archives = find_archives(source, skip=options.out) if source.exists() else []
    try:
        return form.read(
            Owners(source, form.title, target if source.is_file() and archives else None), *options.lists()
        )
    except AbsentError:
        if not archives:
            raise
    archives.sort(key=lambda archive: archive.size)
    for archive in archives[:-1]:
        unpack([archive], target, ANNOTATION_SUFFIXES)
        try:
            return form.read(Owners(source, form.title, target), *options.lists())
        except AbsentError:
            continue
    unpack(archives[-1:], target, ANNOTATION_SUFFIXES)
    return form.read(Owners(source, form.title, target), *options.lists())


def _scan(options: Options, plan: Plan | None) -> Catalogue:
    """The videos: those that lie in --videos and, where one of the plan's is not among them, those in archives there.

    Without a plan (`folder`) archives count only where no video lies beside them. Where both kinds are needed, what lies
    in --videos is linked to beside what was unpacked, so that one folder holds all videos of the lists.
    """
    source, frame_folders = options.videos, plan is not None and plan.published_frames
    archives = find_archives(source, skip=options.out) if source.exists() else []
    if source.is_file() and not archives:
        raise PrepareError(f"{source}: is neither a folder nor an archive of a known kind")
    loose = None if source.is_file() else scan(source, frame_folders, skip=options.out)
    if not archives or (loose and plan and not _absent(plan, loose)):
        return loose
    if plan is None and loose and loose.by_name:
        logger.warning("--videos %s: %s is left alone, videos lie beside it", source, archives[0])
        return loose
    target = options.out / UNPACKED / "videos"
    link = target / LOOSE
    if link.is_symlink():
        link.unlink()
    unpack(archives, target)
    catalogue = scan(target, frame_folders)
    if loose and plan and any(loose.find(entry) for entry in _absent(plan, catalogue)):
        link.symlink_to(source.absolute(), target_is_directory=True)
        return scan(target, frame_folders, skip=options.out)
    return catalogue


def _absent(plan: Plan, catalogue: Catalogue) -> list[Entry]:
    return [entry for entry in plan.entries if catalogue.find(entry) is None]


def _require_complete(report: Report, options: Options) -> None:
    """Warns of empty splits; raises PrepareError where all are, or videos are left out that nobody agreed to leave out."""
    if report.unreadable and not options.allow_missing:
        name, reason = report.unreadable[0]
        found = sum(counts.found for counts in report.splits.values())
        raise PrepareError(
            f"{len(report.unreadable)} of {found} videos cannot be read, such as {name} ({reason}), so no list is written; "
            f"{options.out / 'report.txt'} names them, --allow-missing leaves them out"
        )
    empty = [split for split, counts in report.splits.items() if counts.found == counts.unreadable]
    for split in empty:
        counts = report.splits[split]
        why = "are missing or unreadable" if counts.missing and counts.unreadable else "cannot be read"
        why = why if counts.unreadable else "are missing"
        logger.warning("%s: all of its %d videos %s: no %s.txt", split, counts.listed, why, split)
    if len(empty) == len(report.splits):
        raise PrepareError(f"no video of {report.dataset} can be read; {options.out / 'report.txt'} says why")


def _write_lists(
    options: Options,
    plan: Plan,
    videos: Path,
    found: Mapping[Entry, str],
    outcomes: Mapping[str, Outcome],
    store: FrameStore | None,
) -> None:
    """Writes labels, lists that have rows and, last, the snippet; `store` has the frames, None: the videos themselves."""
    out = options.out
    write_labels(out / "labels.csv", plan.classes)
    written = []
    for split in plan.splits:
        rows: list[Sequence[object]] = []
        for entry, path in found.items():
            outcome = outcomes[path]
            if entry.split != split or outcome.error:
                continue
            if store is not None:
                rows.append((store.folder_of(path), outcome.frames, entry.label))
            else:
                rows.append((path, outcome.frames, entry.label) if plan.published_frames else (path, entry.label))
        if rows:
            write_rows(out / f"{split}.txt", rows)
            written.append(split)
    root = os.path.abspath(store.root if store else videos)
    text = write_snippet(out, plan, options.numbered_split(), written, root, store is not None, options.decoder)
    logger.info("%s", text)
