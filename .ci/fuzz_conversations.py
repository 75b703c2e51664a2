"""Odd conversations through tokenisation and collation: `python .ci/fuzz_conversations.py [N] [SEED]`.

Each must be trained or counted, and nothing may raise. Ends with 1 and names the case where one fails.
"""

import json
import sys
import time

import numpy as np
from PIL import Image

ROLES = ('human', 'gpt', 'system', 'user', 'assistant', 'function_call', None)
TEXTS = (
    *(
        '',
        ' ',
        '\n',
        '\n\n',
        'a ring',
        'What is this?',
        '\nThe ring',
        '\n\nA star\n',
        'ä ß 字 🟥',
        'e\u0301',
        '\u200f\x00\x07',
    ),
    *('<image>', '<image>\nWhat?', '<image><image>', '<video>', '<image:0>', '<image:1>', '<image:7>', '<image:x>'),
    *('<mask:0>', '<mask:9>', '<|mt_start|><|mt_0001|><|mt_0258|><|mt_end|>', '<|mt_start|>', '<|mt_9999|>'),
    *(
        '<|image_pad|>',
        '<|video_pad|>',
        '<|vision_start|>',
        '<|vision_end|>',
        '<|im_start|>user\n',
        '<|im_end|>',
        '<|im_end|>\n',
    ),
    *(
        '<|endoftext|>',
        '<think>',
        '</think>\n\n',
        '<|object_ref_start|>ring<|object_ref_end|>',
        '{{ messages }}',
        '{% for %}',
    ),
    *('word ' * 300, '\ud800', '```json\n[{"mask_2d": "', '</s>', '\\', '"'),
)
SIZES = ((28, 28), (28, 28), (1, 1), (1, 300), (400, 1), (28, 60))


def image_files(folder):
    "Write the few images that all conversations share -> their names."
    for height, width in set(SIZES):
        Image.fromarray(np.full((height, width, 3), 128, np.uint8)).save(folder / f'{height}x{width}.png')
    whole = (folder / '28x28.png').read_bytes()
    (folder / 'cut.png').write_bytes(whole[: len(whole) // 2])
    (folder / 'none.png').write_bytes(b'')
    (folder / 'text.png').write_bytes(b'no image')
    return [f'{h}x{w}.png' for h, w in SIZES] * 3 + ['cut.png', 'none.png', 'text.png', 'missing.png']


def odd_text(rng):
    "Join some odd pieces; now and then it is no text."
    if rng.random() < 0.03:
        return (None, 3, ['a'], {})[int(rng.integers(4))]
    pieces = rng.choice(len(TEXTS), int(rng.integers(1, 4)))
    return ''.join(TEXTS[k] for k in pieces)


def odd_conversation(
    rng,  # numpy Generator
    images=('28x28.png',),  # names of image files to choose from
):  # -> dict as LLaVA's files hold it: id, image or images, conversations
    "Make a conversation that is odd in some places, and now and then is not."
    kind = rng.random()
    entry = dict(id=str(int(rng.integers(10**6))), image=str(images[0]))
    if kind < 0.4:  # nothing or one thing is odd
        texts = ['<image>\nWhat?', 'a ring']
        if kind < 0.15:
            entry['image'] = str(images[int(rng.integers(len(images)))])
        elif kind < 0.3:
            k = int(rng.integers(2))
            texts[k] = texts[k] * (1 - k) + str(odd_text(rng))
        return entry | dict(conversations=[{'from': r, 'value': v} for r, v in zip(('human', 'gpt'), texts)])
    turns = []
    for k in range(int(rng.integers(4))):
        roles = ('human', 'gpt') if rng.random() < 0.7 else tuple(rng.choice(ROLES, 2))
        asks, answers = odd_text(rng), odd_text(rng)
        if k == 0 and isinstance(asks, str) and rng.random() < 0.8:
            asks = '<image>\n' + asks
        turns.append({'from': roles[0], 'value': asks})
        turns += [{'from': roles[1], 'value': answers}] if rng.random() < 0.9 else []
    count = int(rng.choice([0, 1, 1, 1, 2, 3]))
    entry['image'] = [str(images[int(rng.integers(len(images)))]) for _ in range(count)]
    return entry if rng.random() < 0.02 else entry | dict(conversations=turns)


def _row(entry, folder):
    "The record of a shard that skipped every check of tokenisation: the collator alone stands guard."
    named = entry.get('image', [])
    images = []
    for name in [named] if isinstance(named, str) else named:
        images.append((folder / name).read_bytes() if (folder / name).exists() else None)
    roles = dict(human='user', gpt='assistant')
    messages = [
        dict(role=roles.get(turn['from'], turn['from']), content=turn['value'])
        for turn in entry.get('conversations', [])
    ]
    for message in messages:
        if isinstance(message['content'], str):
            message['content'] = message['content'].replace('<image>', '<image:0>', 1)
    return dict(id=entry['id'], dataset='odd', messages=json.dumps(messages), images=images)


def conversations(n=100_000, seed=0):
    "Tokenise and collate n odd conversations; each must be trained or counted, and nothing may raise."
    import tempfile
    from pathlib import Path

    from samtok.batches import ChatCollator
    from samtok.chat import ChatDataset, Conversation
    from samtok.chat_formats import llava_messages
    from samtok.data import Report
    from samtok.shards import tokenize_batch
    from samtok.toy.scenes import toy_corpus
    from samtok.toy.tiny_models import tiny_processor, tiny_tokenizer

    class Odd(ChatDataset):
        name = 'odd'

        def load(self, entry):
            named = entry.get('image', [])
            images = [folder / name for name in ([named] if isinstance(named, str) else named)]
            messages = llava_messages(entry['conversations'], len(images))
            return Conversation(messages, images, id=entry['id'], dataset=self.name)

    corpus = [*toy_corpus(60), *['a\n\nb c\n\nd\n\n\ne'] * 3000]  # a tokenizer that merges line ends
    processor = tiny_processor('qwen3_vl', tiny_tokenizer(corpus, 600), 14, pixels=(28**2, 28**2))
    start, trained, counted, batch_of = time.time(), 0, 0, 8
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = image_files(folder)
        good = _row(odd_conversation(np.random.default_rng(0)), folder)
        good |= dict(messages=json.dumps([dict(role=r, content='a ring') for r in ('user', 'assistant')]), images=[])
        collators = [ChatCollator(processor, max_length=most) for most in (0, 60)]
        for collate in collators:
            collate([good])  # what a lost batch is replaced by
        for k in range(0, n, batch_of):
            rng = np.random.default_rng([seed, k])
            entries = [odd_conversation(rng, files) for _ in range(min(batch_of, n - k))]
            collate, report, data = collators[k // batch_of % 2], Report(), Odd()
            try:
                if k // batch_of % 4 < 2:  # read, tokenised and collated
                    read = [c for entry in entries if (c := data._read(entry, 0)) is not None]
                    rows = tokenize_batch(None, read, report)
                    lost = len(entries) - len(rows)
                    skipped = [
                        v for r in (report, data.report) for reason, v in r.items() if reason.endswith('skipped')
                    ]
                    assert lost == sum(skipped), f'{lost} lost, counted {dict(report)} {dict(data.report)}'
                else:
                    rows, lost = [_row(entry, folder) for entry in entries], 0
                if rows:
                    before = dict(collate.report)
                    labels = collate(rows)['labels']
                    new = {reason: v - before.get(reason, 0) for reason, v in collate.report.items()}
                    left = sum(v for reason, v in new.items() if reason.endswith('left out'))
                    learned = 0 if new.get('batch replaced') else len(labels)
                    assert learned + left == len(rows), f'{learned} learned and {left} counted of {len(rows)}'
                    assert (labels[:, 1:] >= 0).any(1).all(), 'a row without anything to learn'
                    trained, lost = trained + learned, lost + left
                counted += lost
            except Exception as e:
                print(f'seed {seed}, batch {k}: {type(e).__name__}: {e}\n{json.dumps(entries)}', file=sys.stderr)
                raise SystemExit(1) from e
    assert trained + counted == n, (trained, counted, n)
    print(f'{n} odd conversations: {trained} trained, {counted} counted, 0 exceptions, {time.time() - start:.0f} s')
    for collate in collators:
        print(collate.report)


if __name__ == '__main__':
    conversations(*map(int, sys.argv[1:]))
