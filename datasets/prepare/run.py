"""One preparation from start to end: annotations, archives, videos, frames, report, lists.

Lives here: the order of the steps, and when a run may not end in lists. Does not live here: any of the steps.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets.prepare.catalogue import match
from datasets.prepare.decode import Outcome
from datasets.prepare.extract import FrameStore, extract_all, look_at_all
from datasets.prepare.formats.folder import identical_across_sides
from datasets.prepare.lists import PrepareError, write_labels, write_rows
from datasets.prepare.options import Options
from datasets.prepare.output_dir import workplace
from datasets.prepare.plan import Entry, Plan
from datasets.prepare.report import Report, make_report
from datasets.prepare.snippet import write_snippet
from datasets.prepare.survey import survey

logger = logging.getLogger("td4v")


def prepare(options: Options) -> Report:
    """Prepares a dataset; see the module for the files.

    Raises:
        PrepareError: anything that a user can mend; what is finished stays, and no list is written.
        OSError: the disk is full or fails.
    """
    options.check()
    with workplace(options.out, options.use()) as place:
        plan, catalogue = survey(options)
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
