"""What there is to prepare: the annotations' plan and the videos, of loose files and of archives, where they are needed.

Lives here: which archives are unpacked, and when. Does not live here: unpacking (archives.py), listing (catalogue.py).
"""

from __future__ import annotations

import logging

from datasets.prepare.annotation_files import AbsentError, AnnotationFiles
from datasets.prepare.archives import find_archives, unpack
from datasets.prepare.catalogue import Catalogue, scan
from datasets.prepare.formats import FORMATS
from datasets.prepare.formats.folder import read as read_folder
from datasets.prepare.lists import PrepareError
from datasets.prepare.options import Options
from datasets.prepare.output_dir import UNPACKED
from datasets.prepare.plan import Entry, Plan

ANNOTATION_SUFFIXES = frozenset((".txt", ".csv", ".json"))
LOOSE = "loose"  # a link to --videos among the folders that its archives became

logger = logging.getLogger("td4v")


def survey(options: Options) -> tuple[Plan, Catalogue]:
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
            AnnotationFiles(source, form.title, target if source.is_file() and archives else None), *options.lists()
        )
    except AbsentError:
        if not archives:
            raise
    archives.sort(key=lambda archive: archive.size)
    for archive in archives[:-1]:
        unpack([archive], target, ANNOTATION_SUFFIXES)
        try:
            return form.read(AnnotationFiles(source, form.title, target), *options.lists())
        except AbsentError:
            continue
    unpack(archives[-1:], target, ANNOTATION_SUFFIXES)
    return form.read(AnnotationFiles(source, form.title, target), *options.lists())


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
    if loose and plan and len(_absent(plan, catalogue)) == len(plan.entries):
        return loose  # archives of something else
    if loose and plan and any(loose.find(entry) for entry in _absent(plan, catalogue)):
        link.symlink_to(source.absolute(), target_is_directory=True)
        return scan(target, frame_folders, skip=options.out)
    return catalogue


def _absent(plan: Plan, catalogue: Catalogue) -> list[Entry]:
    return [entry for entry in plan.entries if catalogue.find(entry) is None]
