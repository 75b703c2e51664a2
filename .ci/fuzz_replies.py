#!/usr/bin/env python
"""Random replies through everything that reads replies: no text may raise an error.

    .ci/fuzz_replies.py [--n N] [--seed S]

A reply is a good one that was cut, repeated, mixed with another, or had pieces put in or taken out. At the first
failure the seed, the reader and the reply are printed and the exit status is 1.
"""

import argparse
import json
import random
import sys
import time

from samtok.benchmarks import answer_part, relations_of
from samtok.chat import read_answer
from samtok.rewards import find_exploits, read_triplets, reply_text, safe, split_reply, task_rewards
from samtok.show import words_html
from samtok.words import MaskVocab

VOCABS = [MaskVocab(), MaskVocab(256, 4), MaskVocab(16, 1), MaskVocab(20000, 2)]
PIECES = ['<|mt_start|>', '<|mt_end|>', '<|mt_0003|>', '<|mt_0300|>', '<|mt_9999|>', '<|mt_00012|>', '<|mt_', '|>']
PIECES += ['<think>', '</think>', '<answer>', '</answer>', '<|object_ref_start|>', '<|object_ref_end|>', '<|im_end|>']
PIECES += ['```json\n[', ']\n```', '{', '}', '[', ']', '"', '\\', '\\u', '\\ud83d', ':', ',']
PIECES += ['"label": "', '"mask_2d": "', '{"subject": ', '"predicate": ', '"object": ']
PIECES += ['null', 'NaN', '-Infinity', '1e999', '9' * 400, '-', '0' * 40, ' ', '\n', '\r\n', '\t', '\0', '\x0b', '\x1b']
PIECES += ['\x85', '\u2028', '\ufeff', '\u202e', '\ud800', '\udfff', '٣', '𝟛', 'é', 'e\u0301', '😀', '👩\u200d👩']
PIECES += ['No target.', '<mask:0>', '<image:0>', '<|image_pad|>', 'a cup', '<', '>', '$x$', '|||']


def groups(vocab, rng, n):
    "Write n groups of mask words."
    codes = [[rng.randrange(vocab.codebook_size) for _ in range(vocab.depth)] for _ in range(n)]
    return [vocab.format(mask) for mask in codes]


def good_reply(vocab, rng):
    "Write a reply of one of the forms that models are trained on."
    words = groups(vocab, rng, rng.randint(1, 5))
    labels = [rng.choice(['cup', 'a man', 'Ümläut "x"', '<b>', '']) for _ in words]
    kind = rng.randrange(5)
    if kind == 0:
        return 'No target.'
    if kind == 1:
        return ' and '.join(f'<|object_ref_start|>{a}<|object_ref_end|>{w}' for a, w in zip(labels, words))
    if kind == 2:
        return '<think>The cup. ' + words[0] + '</think>\n<answer>' + ''.join(words) + '</answer>'
    sides = [dict(mask_2d=w, label=a) for w, a in zip(words, labels)]
    if kind == 3:
        sides = [dict(subject=a, predicate='on', object=b) for a, b in zip(sides, sides[::-1])]
    return '```json\n' + json.dumps(sides, ensure_ascii=rng.random() < 0.5) + '\n```'


def mutate(text, other, rng):
    "Break a reply in one place."
    at = rng.randint(0, len(text))
    end = min(len(text), at + rng.choice([1, 3, 12, 40]))
    kind = rng.randrange(7)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + text[end:]
    if kind == 2:
        return text[:at] + rng.choice(PIECES) + text[at:]
    if kind == 3:
        return text[:at] + text[at:end] * rng.choice([2, 2, 2, 5, 9]) + text[end:]
    if kind == 4:
        return text[:at] + other[rng.randint(0, len(other)) :]
    if kind == 5:
        return (
            text[:at]
            + chr(rng.choice([rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000)]))
            + text[end:]
        )
    return (
        text[:at] + rng.choice(['{', '[', '{"a":', '<|mt_start|>', '<think>', ' ']) * rng.choice([2, 5, 20]) + text[at:]
    )


def replies(
    n: int,  # how many
    seed: int,  # the same seed gives the same replies
):  # -> iterator of (MaskVocab, good reply, reply)
    "Draw replies and break them."
    rng = random.Random(seed)
    pools = [[good_reply(vocab, rng) for _ in range(400)] for vocab in VOCABS]
    for _ in range(n):
        k = rng.choice([0, 0, 0, 1, 2, 3])
        vocab, good, other = VOCABS[k], rng.choice(pools[k]), rng.choice(pools[k])
        reply = good
        for _ in range(rng.choice([0, 1, 1, 2, 4, 9])):
            reply = mutate(reply, other, rng)
        if rng.random() < 0.0001:  # deeper than any parser goes by recursion
            reply += rng.choice(['[', '{"a":', '{"a":[']) * 20000 + rng.choice(['', ']'])
        yield vocab, good, reply


def check_words(vocab, reply, policy_of_labels):
    "Read and mend mask words under every policy; what is read must be what stands in the text."
    for policy in vocab.policies:
        spans = vocab.parse(reply, policy)
        assert all(reply[s.start : s.end] == s.text and len(s.codes) == vocab.depth for s in spans), policy
        assert len(vocab.codes(spans)) == sum(s.ok for s in spans), policy
    for policy in ('published', 'strict', 'first'):
        vocab.repair(reply, policy)
    strict = vocab.parse(reply)
    good = [s.codes for s in strict if s.ok]
    assert [s.codes for s in vocab.parse(' '.join(s.text for s in strict if s.ok))] == good
    words_html(reply, strict)
    labelled = read_answer(reply, vocab, policy_of_labels)
    assert [span for _, span in labelled] == vocab.parse(reply, policy_of_labels)
    assert all(label is None or isinstance(label, str) for label, _ in labelled)


def check_texts(vocab, reply):
    "Read tags, answers and triplets."
    assert reply_text([dict(role='assistant', content=[dict(type='text', text=reply)])]) == reply
    split_reply(reply)
    answer_part(reply)
    assert all(isinstance(field, str) for triplet in read_triplets(reply) for field in triplet)
    relations_of(reply, [s.text for s in vocab.parse(reply)])


def make_rewards(vocab):
    "Make the rewards of each task, a list for each mode, wrapped so that an error is counted."
    kinds = dict(
        gres=('paper', 'released', 'graded'), gcg=('released', 'graded'), psg=('released', 'graded'), no_target=(None,)
    )
    return [[safe(r) for r in task_rewards(task, mode, vocab)] for task, modes in kinds.items() for mode in modes]


def check_rewards(rewards, vocab, good, reply):
    "Score the reply with the rewards of a task: numbers in [0,1], or None where a reward is not for the sample."
    for reward in rewards:
        (value,) = reward([reply], answer=[good])
        assert not reward.failures, reward.failures
        assert value is None or 0 <= value <= 1, (reward.__name__, value)
    find_exploits(reply, good, vocab)


def main(
    n: int = 10**6,  # replies
    seed: int = 0,  # of the replies
) -> int:  # 0, or 1 at a failure
    "Read n random replies."
    start = time.time()
    rewards = {vocab: make_rewards(vocab) for vocab in VOCABS}
    for i, (vocab, good, reply) in enumerate(replies(n, seed)):
        step = 'words'
        try:
            check_words(vocab, reply, vocab.policies[i % len(vocab.policies)])
            step = 'texts'
            check_texts(vocab, reply)
            step = 'rewards'
            check_rewards(rewards[vocab][i % 8], vocab, good, reply)
        except Exception as e:
            print(f'seed {seed}, reply {i}, {step} with {vocab}: {type(e).__name__}: {str(e)[:400]}\n{reply[:3000]!r}')
            return 1
    print(f'{n:,} replies, 0 exceptions, {time.time() - start:.0f} s')
    return 0


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--n', type=int, default=10**6)
    parser.add_argument('--seed', type=int, default=0)
    sys.exit(main(**vars(parser.parse_args())))
