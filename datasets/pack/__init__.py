"""A pack: one folder with a few large zip files in place of millions of frame files, and an index to read them at random.

    python -m datasets.pack --frames DIR --out DIR.pack [--list train.txt --list val.txt] [--image-tmpl '{:06d}.jpg']
                            [--index-base 1] [--shard-size 1GiB] [--jobs N]
    python -m datasets.pack --verify PACK [--jobs N]       reads everything and compares the zips' checksums
    python -m datasets.pack --reindex PACK [--jobs N]      makes the index and pack.json again from the zips alone

Lives here: packs, one thing a file: format.py (and reading), scan.py (what is wrong with frame folders), writer.py,
verify.py (verifying, reindexing), workers.py (parallel tasks with progress), __main__.py (the command line).
Does not live here: making frames (datasets/prepare/), decoding them (datasets/readers.py).
"""
