"""Turns a dataset's downloads into frames, lists and labels.

    python -m datasets.prepare ucf101|hmdb51|ssv2|ssv1|k400|diving48|folder --videos DIR --annotations DIR --out DIR
    python -m datasets.prepare.synthetic --out DIR    a small dataset that is drawn, not downloaded

__main__.py           the command line
run.py                the options and the order of the steps
formats/              published annotations -> a Plan (plan.py); annotation_files.py finds and reads the files
archives.py           unpacks what was downloaded
catalogue.py          which videos are there, and which of them the plan names
frame_folders.py      folders of frames that are used as they are
extract.py            the frames of all videos; decode.py: of one
report.py             report.json, report.txt and config_snippet.yaml
output_dir.py         lock, settings, lists and free space of the output folder

List rows are `path num_frames label` for frames and `path label` for videos. Extracted frames are numbered from 1 as `{:06d}.jpg`.
"""
