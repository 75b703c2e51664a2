"Use the core of samtok, without any extra, and compare with values known by hand: python .ci/use_core.py"

import sys

import numpy as np

from samtok.masks import mask_iou, mask_to_box, mask_to_polygons, mask_to_rle, polygons_to_mask, rle_to_mask
from samtok.metrics import GRES, RES
from samtok.rewards import FormatReward, MaskReward
from samtok.words import MaskVocab

masks = np.zeros((2, 6, 8), bool)  # a square of 16 pixels, and one of 16 that shares 8 with it
masks[0, 1:5, 1:5] = masks[1, 1:5, 3:7] = True
assert np.allclose(mask_iou(masks, masks), [[1, 8 / 24], [8 / 24, 1]])
assert mask_to_box(masks[0]).tolist() == [1, 1, 5, 5]
assert (rle_to_mask(mask_to_rle(masks[1])) == masks[1]).all()
assert (polygons_to_mask(mask_to_polygons(masks[0]), (6, 8)) == masks[0]).all()

vocab = MaskVocab()
words = vocab.format([[3, 7], [250, 0]])
assert vocab.codes(vocab.parse(f'It is {words}.')).tolist() == [[3, 7], [250, 0]]

metric = RES()
for prediction in masks:
    metric.update(prediction, masks[0])
figures = metric.compute()
assert np.isclose(figures['cIoU'], (16 + 8) / (16 + 24)) and np.isclose(figures['mIoU'], (1 + 8 / 24) / 2), figures
empty = np.zeros((6, 8), bool)
metric = GRES()
metric.update(empty, empty)
assert metric.compute()['N_acc'] == 1

reply = vocab.format([[3, 7], [250, 1]])  # one of two masks is right, of the other the first code
assert MaskReward().score(reply, words) == 0.5
assert np.isclose(MaskReward('graded').score(reply, words), (1 + 0.4) / 2)
assert FormatReward().score('<think>Two.</think><answer>Here.</answer>', '') == 1
heavy = sorted({'torch', 'transformers', 'matplotlib', 'IPython'} & set(sys.modules))
assert not heavy, heavy
print('The core works without extras:', words)
