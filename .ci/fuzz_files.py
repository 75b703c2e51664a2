"""Mutated annotation files through the readers: `python .ci/fuzz_files.py [N] [SEED]`.

Each file is a small COCO, labelme, VOC or YOLO set with a few random changes. Reading it must never raise but
DataError when it is opened, and every region of the file must come out as a mask or be counted. Ends with 1 and the
seed of the file where one fails.
"""

import copy
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from samtok.files import DataError
from samtok.formats import open_dataset

H, W = 24, 32
ODD = (None, True, -1, 0, 1, 7, 2**70, -1e300, 0.5, float('nan'), float('inf'), '', 'a', '0', '12.5', [], {}, [[]])
MORE = ([1, 2], [[1, 2, 3]], {'counts': [], 'size': [1, 1]}, [{'x': 1}], 'x' * 300, '\ud800', '../a.png', 'a\x00b')
SQUARE = [4, 4, 14, 4, 14, 14, 4, 14]


def places(value, path=()):
    "All places in a JSON value, as paths."
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    if isinstance(value, list):
        for i, inner in enumerate(value):
            yield from places(inner, (*path, i))


def mutate(value, rng):
    "Change a JSON value at a few random places."
    value = copy.deepcopy(value)
    for _ in range(rng.integers(0, 4)):
        path = list(places(value))[1:]
        if not path:
            break
        *way, last = path[rng.integers(len(path))]
        parent = value
        for key in way:
            parent = parent[key]
        kind = rng.integers(4)
        if kind == 0:
            del parent[last]
        elif kind == 1 and isinstance(parent, list):
            parent.insert(last, copy.deepcopy(parent[last]))
        else:
            odd = ODD + MORE
            parent[last] = copy.deepcopy(odd[rng.integers(len(odd))])
    return value


def spoil(data, rng):
    "Cut bytes, or change some."
    data = bytearray(data)
    if rng.random() < 0.5:
        return bytes(data[: rng.integers(len(data) + 1)])
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(len(data))] = rng.integers(256)
    return bytes(data)


def write_json(path, value, rng):
    "Write a mutated JSON value; one file of eight is spoilt as bytes, too -> the value, None where it is no JSON."
    text = json.dumps(mutate(value, rng)).encode(('utf-8', 'utf-8-sig', 'utf-16')[rng.integers(3)])
    path.write_bytes(spoil(text, rng) if rng.random() < 0.125 else text)
    return path


def lost(before, after):
    "Regions that a report has counted as left out in between."
    ends = ('dropped', 'shape skipped', 'annotation skipped', 'regions of skipped samples')
    return sum(n - before[reason] for reason, n in after.items() if reason.endswith(ends))


def given_regions(regions, dataset, record):
    "Regions of the file of a record; None where the file does not tell."
    try:
        return regions(dataset, record)
    except (ValueError, LookupError, TypeError, OSError):
        return None


def check(dataset, regions):
    "Read all records: masks out and counted regions must be those of the file -> counts of samples and of skips."
    count = Counter()
    for record in dataset.records():
        before = Counter(dataset.report)
        sample = dataset._read(record, 0)
        skipped = sum(n - before[r] for r, n in dataset.report.items() if r.endswith('sample skipped'))
        assert skipped == (sample is None), f'record {record} is gone without a count: {dataset.report}'
        given, out, counted = given_regions(regions, dataset, record), len(sample or ()), lost(before, dataset.report)
        assert given in (None, out + counted), (
            f'record {record}: {given} regions, {out} masks, {counted} counted: {dataset.report}'
        )
        none = dataset.report['images without regions'] - before['images without regions']
        assert none == 1 if sample is not None and given == 0 else none <= 1, f'{record}: {given}, {dataset.report}'
        count.update({'samples' if sample is not None else 'skipped': 1}, masks=out, counted=counted)
    return count


def coco(folder, rng):
    "A COCO file with two images and three annotations."
    rle = {'size': [H, W], 'counts': [100, 50, H * W - 150]}
    value = dict(
        images=[dict(id=i, file_name=name, height=H, width=W) for i, name in ((1, 'a.png'), (2, 'b/a.png'))],
        annotations=[
            dict(
                id=1, image_id=1, category_id=1, iscrowd=0, segmentation=[SQUARE, SQUARE], area=100, bbox=[4, 4, 10, 10]
            ),
            dict(id=2, image_id=1, category_id=2, iscrowd=1, segmentation=rle),
            dict(id=3, image_id=2, category_id=1, iscrowd=0, segmentation=[SQUARE]),
        ],
        categories=[dict(id=1, name='cup'), dict(id=2, name='ball')],
    )
    path = write_json(folder / 'coco.json', value, rng)
    dataset = open_dataset('coco', json=path, images=folder / 'images')
    return check(dataset, lambda d, i: len(list(d.coco.annotations_of(d.coco.image_at(i)['id']))))


def labelme(folder, rng):
    "A labelme file with shapes of three kinds."
    points = np.reshape(SQUARE, (-1, 2)).tolist()
    shapes = [
        dict(label='cup', points=points, shape_type='polygon', flags={}),
        dict(label='ball', points=[[10, 10], [14, 10]], shape_type='circle'),
        dict(label='box', points=[[1, 1], [9, 9]], shape_type='rectangle'),
    ]
    root = folder / 'labelme'
    path = write_json(
        root / 'a.json', dict(shapes=shapes, imagePath='a.png', imageData=None, imageHeight=H, imageWidth=W), rng
    )

    def given(dataset, record):
        from samtok.runs import read_json

        shapes = read_json(path)['shapes']
        return len(shapes) if isinstance(shapes, list) else None

    return check(open_dataset('labelme', root=root), given)


def voc(folder, rng):
    "Maps of objects and classes with odd numbers, sometimes spoilt."
    objects = np.zeros((H, W), np.uint8)
    classes = objects.copy()
    for k in range(rng.integers(0, 4)):
        y, x = rng.integers(0, H - 4), rng.integers(0, W - 4)
        objects[y : y + 4, x : x + 4] = rng.choice([k + 1, 255, 200])
        classes[y : y + 4, x : x + 4] = rng.choice([1, 5, 20, 21, 90, 255, 0])
    for name, ids in (('SegmentationObject', objects), ('SegmentationClass', classes)):
        image = Image.fromarray(ids).convert('P') if rng.random() < 0.9 else Image.fromarray(ids[:-2])
        image.putdata(ids[: image.height].ravel().tolist())
        path = folder / 'voc' / name / 'a.png'
        image.save(path)
        if rng.random() < 0.1:
            path.write_bytes(spoil(path.read_bytes(), rng))
    from samtok.files import read_ids

    def given(dataset, record):
        return len(set(np.unique(read_ids(folder / 'voc/SegmentationObject/a.png')).tolist()) - {0, 255})

    dataset = open_dataset('voc', root=folder / 'voc')
    return check(dataset, given)


def yolo(folder, rng):
    "Lines of classes and points in [0,1], with odd words."
    lines = []
    for _ in range(rng.integers(0, 5)):
        points = rng.random(2 * rng.integers(2, 7)).round(3).tolist()
        words = [str(rng.choice(['0', '1', '1.0', '7', '-1'])), *map(str, points)]
        for _ in range(rng.integers(0, 3)):
            odd = ('', 'nan', 'inf', '1e400', 'a', '-3', '0x1', '12,5', '٣', '_1', '\x00', '700')
            words[rng.integers(1, len(words))] = odd[rng.integers(len(odd))]  # NUL first would be UTF-16
        lines.append(' '.join(words))
    file = folder / 'labels/a.txt'
    text = '\n'.join(lines).encode(('utf-8', 'utf-8-sig', 'utf-16')[rng.integers(3)])
    file.write_bytes(text)
    dataset = open_dataset('yolo_seg', images=folder / 'images', labels=folder / 'labels', names=['cup', 'ball'])

    def given(dataset, record):
        return (
            sum(bool(line.strip()) for line in lines)
            if Path(record).name == 'a.png' and 'b' not in Path(record).parts
            else 0
        )

    return check(dataset, given)


KINDS = (coco, labelme, voc, yolo)


def make_folder(folder):
    "The images and folders that all files share."
    for part in ('images/b', 'labelme', 'voc/JPEGImages', 'voc/SegmentationObject', 'voc/SegmentationClass', 'labels'):
        (folder / part).mkdir(parents=True)
    for name in ('images/a.png', 'images/b/a.png', 'labelme/a.png', 'voc/JPEGImages/a.png'):
        Image.fromarray(np.full((H, W, 3), 128, np.uint8)).save(folder / name)


def main(n=10_000, seed=0):
    "Read n mutated files -> exit code."
    folder, begun, total = Path(tempfile.mkdtemp()), time.time(), Counter()
    make_folder(folder)
    try:
        for i in range(n):
            rng = np.random.default_rng([seed, i])
            kind = KINDS[i % len(KINDS)]
            try:
                total += kind(folder, rng)
            except DataError:
                total['refused'] += 1
            except Exception as e:
                print(f'file {i} of seed {seed} ({kind.__name__}): {type(e).__name__}: {e}')
                return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f'{n} files, {dict(total)}, {time.time() - begun:.0f} s')
    return 0


if __name__ == '__main__':
    sys.exit(main(*map(int, sys.argv[1:])))
