#!/usr/bin/env python
"""Tiny models in vLLM on a CPU: the same replies as transformers, and no malformed mask under the grammar.

    .ci/vllm_test.py [PART ...] [--groups N] [--walks N]

Parts: walks engine server trl (all of them where none is named), each in a process of its own with a time limit.
Run it with the Python of a virtual environment that has vLLM (`make vllm-test`). It prints one line for each claim;
the exit status is 1 if one fails.
"""

import argparse
import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMITS = dict(walks=900, engine=1200, server=1200, trl=1200)  # seconds
FAMILIES = ('qwen3_vl', 'qwen2_5_vl')
ENGINE = dict(
    dtype='float32',
    max_model_len=1024,
    max_num_seqs=32,
    enforce_eager=True,
    disable_log_stats=True,
    mm_processor_cache_gb=0,
    logits_processors=['samtok.grammar:VLLMGrammar'],
)
LOUD = 6.0  # added to the start of a group, so that replies hold many
TOKENS = 48  # of a sampled reply at most


def claim(name, ok, figures):
    "Print one line."
    print(f'{"ok  " if ok else "FAIL"}  {name}: {figures}', flush=True)
    return ok


# --- models, prompts, and how replies are judged


def make_model(family, folder):
    "Save a tiny random model with mask words."
    import torch

    from samtok.toy.tiny_models import tiny_model, tiny_processor, tiny_tokenizer
    from samtok.words import MaskVocab

    texts = [
        'Please segment the red circle in this image.',
        'user\nassistant\n',
        'a striped blue ring',
        'No target.',
        '```json\n[{"mask_2d": "", "label": "ring"}, {"mask_2d": ""}]\n```',
    ] * 20
    processor = tiny_processor(family, tiny_tokenizer(texts, 340, family=family))
    processor.tokenizer.add_tokens(MaskVocab().words)
    torch.manual_seed(0)
    model = tiny_model(family, processor, hidden=64, layers=2, heads=2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def picture(seed):
    "Draw a random picture; its sides differ from picture to picture."
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (64 + 32 * (seed % 3), 96, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompts(n):
    "Make conversations about a picture, with mask words in the question -> messages, pictures."
    from samtok.words import MaskVocab

    vocab, found = MaskVocab(), []
    for k in range(n):
        image, file = picture(k), io.BytesIO()
        image.save(file, 'PNG')
        url = 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()
        text = f'Please segment what is left of {vocab.format([7 * k % 256, 11 * k % 256])} in this image.'
        content = [dict(type='image_url', image_url=dict(url=url)), dict(type='text', text=text)]
        found.append(([dict(role='user', content=content)], image))
    return found


def reference(folder, asked, tokens):
    "Let transformers answer, one prompt at a time and greedily -> prompt ids, reply ids."
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor, found = AutoProcessor.from_pretrained(folder), []
    for messages, image in asked:
        plain = [dict(type='image'), messages[0]['content'][1]]
        text = processor.apply_chat_template([dict(role='user', content=plain)], add_generation_prompt=True)
        text = text[0] if isinstance(text, list) else text
        inputs = processor(text=[text], images=[image], return_tensors='pt')
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
        start = inputs['input_ids'].shape[1]
        found.append((ids[:start].tolist(), ids[start:].tolist()))
    return found


def judge(replies, answer=False):
    "Count groups, malformed groups, and groups that the limit of tokens cut; of (text, was it cut?)."
    from samtok.grammar import mask_pattern
    from samtok.words import MaskVocab

    vocab, counts = MaskVocab(), Counter(replies=len(replies), groups=0, malformed=0, cut=0)
    pattern = re.compile(mask_pattern(vocab, answer=True))
    for text, was_cut in replies:
        at = text.rfind(vocab.start)
        if was_cut and at >= 0 and vocab.end not in text[at:]:  # the last group is not finished, nor was the reply
            counts['cut'] += 1
            text = text[:at]
        spans = vocab.parse(text)
        counts['groups'] += len(spans)
        counts['malformed'] += sum(not span.ok for span in spans)
        if answer and not was_cut and not pattern.fullmatch(text):
            counts['malformed'] += 1
    return counts


def sample(write, wanted, answer):
    "Call write(seed) -> replies until there are as many groups as wanted -> counts."
    counts = Counter()
    for seed in range(200):
        counts += judge(write(seed), answer)
        if counts['groups'] >= wanted:
            break
    return counts


def counted(name, counts, wanted, may_cut=True):
    "Claim that no group is malformed."
    good = counts['groups'] >= wanted and not counts['malformed'] and (may_cut or not counts['cut'])
    figures = f'{counts["replies"]:,} replies, {counts["groups"]:,} groups, {counts["malformed"]} malformed'
    return claim(name, good, f'{figures}, {counts["cut"]} cut by the limit of tokens')


# --- walks over the tokens that xgrammar allows


def walk_all(ask, options, tokenizer, n, seed=0, most=24):
    "Walk n times through the tokens that a constraint allows, as a sampler would -> lists of tokens."
    import numpy as np
    import xgrammar as xgr

    size, rng = len(tokenizer), np.random.default_rng(seed)
    info = xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size)
    compiler = xgr.GrammarCompiler(info)
    compiled = compiler.compile_regex(ask['regex']) if 'regex' in ask else compiler.compile_grammar(ask['grammar'])
    mask, end, walks = xgr.allocate_token_bitmask(1, size), tokenizer.eos_token_id, []
    bits = np.arange(32, dtype=np.int32)
    for _ in range(n):
        matcher, walk = xgr.GrammarMatcher(compiled), []
        while not matcher.is_terminated():
            matcher.fill_next_token_bitmask(mask)
            free = ((mask[0].numpy()[:, None] >> bits) & 1).reshape(-1)[:size].astype(bool)
            if len(walk) >= most and free[end]:
                token = end
            else:
                weights = np.where(free, options, 0.0).cumsum()
                token = int(weights.searchsorted(rng.random() * weights[-1], 'right'))
            if len(walk) > 50 * most or not matcher.accept_token(token):
                raise AssertionError(f'a walk does not end: {tokenizer.decode(walk)[:300]!r}')
            walk.append(token)
        walks.append(walk[:-1])
    return walks


def stray_and_open(tokens, ids, n):
    "Count mask tokens outside of a group, and groups that are not closed; read from ids alone."
    level = {t: k for k, t in enumerate(ids)}  # 0 start, then codes, last end
    at, stray, opened = 0, 0, 0  # at: how many tokens of a group are written
    for token in tokens:
        k = level.get(token)
        if k is None:
            opened += at > 0
            at = 0
        elif k == 0:
            opened += at > 0
            at = 1
        else:
            step = (len(ids) - 2) // n + 1 if k == len(ids) - 1 else (k - 1) // n + 1
            good = at == step
            stray += not good
            at = 0 if not good or k == len(ids) - 1 else at + 1
    return stray, opened + (at > 0)


def part_walks(args, folder):
    "Walk over xgrammar's allowed tokens: no stray mask word, no group left open."
    import numpy as np
    from transformers import AutoTokenizer

    from samtok.grammar import mask_word_ids, vllm_structured
    from samtok.words import MaskVocab

    make_model(FAMILIES[0], folder)
    tokenizer, vocab, good = AutoTokenizer.from_pretrained(folder), MaskVocab(), []
    ids = mask_word_ids(tokenizer, vocab).tolist()
    options = np.ones(len(tokenizer))
    options[[ids[0], ids[-1]]] = 60  # many groups
    options[[i for t, i in tokenizer.get_vocab().items() if t in ('<', '|', '<|', '_', 'm', 't')]] = 30  # many tries
    options[tokenizer.eos_token_id] = 10
    free = [random.Random(k).choices(range(len(tokenizer)), options, k=20) for k in range(1000)]
    broken = sum(any(stray_and_open(walk, ids, vocab.codebook_size)) for walk in free)
    good.append(claim('without a constraint the same count finds broken replies', broken > 900, f'{broken} of 1,000'))
    for answer in (False, True):
        for over, chosen in (('text', None), ('tokens', tokenizer)):
            start = time.perf_counter()
            ask = vllm_structured(vocab, answer, chosen, http=True)['structured_outputs']
            walks = walk_all(ask, options, tokenizer, args.walks // (10 if answer else 1))
            texts = [tokenizer.decode(walk) for walk in walks]
            spans = [vocab.parse(text) for text in texts]
            groups, bad = sum(map(len, spans)), sum(not s.ok for found in spans for s in found)
            left = sum('<|mt_' in re.sub(r'<\|mt_start\|>(<\|mt_\d{4}\|>){2}<\|mt_end\|>', '', text) for text in texts)
            figures = f'{len(walks):,} walks, {groups:,} groups, {bad} malformed, {left} texts with parts of groups'
            right = not bad and not left and 2 * groups > len(walks)
            if chosen is not None:
                pairs = [stray_and_open(walk, ids, vocab.codebook_size) for walk in walks]
                stray, opened = (sum(column) for column in zip(*pairs))
                figures += f', {stray} stray tokens, {opened} unclosed'
                right = right and not stray and not opened
            if answer:
                wrong = judge([(text, False) for text in texts], answer=True)['malformed']
                figures, right = f'{figures}, {wrong} not of the published form', right and not wrong
            seconds = time.perf_counter() - start
            name = f'xgrammar, {"answers" if answer else "groups"} over {over}'
            good.append(claim(name, right, f'{figures} ({seconds:.0f} s)'))
    return good


# --- vLLM in this process, and its server


def constraints(tokenizer):
    "List what is sampled: (name, answer?, arguments of vllm_structured or None, mask_words or None)."
    from samtok.words import MaskVocab

    vocab, found = MaskVocab(), []
    for answer in (False, True):
        kind = 'answers' if answer else 'groups'
        found.append((f'{kind}, regular expression', answer, (vocab, answer), None))
        found.append((f'{kind}, grammar over tokens', answer, (vocab, answer, tokenizer), None))
        found.append((f'{kind}, logits processor', answer, None, json.dumps(dict(answer=answer))))
    return found


class Served(NamedTuple):
    "A tiny model, and what transformers answers with it."

    family: str
    path: str  # folder of the model
    asked: list[tuple]  # messages, picture
    wanted: list[tuple]  # of `asked`: prompt ids, reply ids


def served_models(folder, n=8):
    "Make the tiny model of each family, n prompts, and what transformers answers greedily; yields Served."
    for family in FAMILIES:
        path, asked = f'{folder}/{family}', prompts(n)
        make_model(family, path)
        yield Served(family, path, asked, reference(path, asked, 24))


def part_engine(args, folder):
    "vLLM in this process."
    from vllm import LLM, SamplingParams

    good = []
    for model in served_models(folder):
        good += ask_engine(args, model, LLM(model=model.path, **ENGINE), SamplingParams)
    return good


def ask_engine(args, model, llm, params):
    "Ask one engine everything."
    from samtok.grammar import vllm_structured
    from samtok.words import MaskVocab

    tokenizer, good, family = llm.get_tokenizer(), [], model.family
    asked = [messages for messages, _ in model.asked]
    loud = dict(logit_bias={tokenizer.convert_tokens_to_ids(MaskVocab().start): LOUD})

    def chat(**how):
        return llm.chat(asked, params(**how), use_tqdm=False)

    got = chat(temperature=0, max_tokens=24)
    same = [list(g.prompt_token_ids) == ids for g, (ids, _) in zip(got, model.wanted)]
    equal = [list(g.outputs[0].token_ids) == ids for g, (_, ids) in zip(got, model.wanted)]
    figures = f'{sum(same)} of 8 prompts and {sum(equal)} of 8 replies have the same tokens'
    good.append(claim(f'{family} in process, greedy', all(same) and all(equal), figures))
    free = chat(max_tokens=TOKENS, seed=0, n=4, skip_special_tokens=False, **loud)
    counts = judge([(o.text, False) for g in free for o in g.outputs])
    figures = f'{counts["malformed"]} of {counts["groups"]} groups malformed'
    good.append(claim(f'{family} in process, free', counts['malformed'] > 20, figures))
    for name, answer, structured, words in constraints(tokenizer):

        def write(seed, structured=structured, words=words):
            how = vllm_structured(*structured) if structured else dict(extra_args=dict(mask_words=words))
            got = chat(max_tokens=TOKENS, seed=seed, n=8, **loud, **how)
            return [(o.text, o.finish_reason == 'length') for g in got for o in g.outputs]

        counts = sample(write, args.groups, answer)
        good.append(counted(f'{family} in process, {name}', counts, args.groups, may_cut=words is None))
    return good


def post(port, path, body=None, timeout=300):
    "Ask the server -> dict; an error's text under `error`."
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f'http://127.0.0.1:{port}{path}', data, {'Content-Type': 'application/json'})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            text = reply.read().decode()
            return json.loads(text) if text else {}
    except urllib.error.HTTPError as e:
        return dict(error=e.read().decode(), status=e.code)


def start_server(path, log):
    "Start the OpenAI-compatible server -> process, port."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    options = ['--model', path, '--served-model-name', 'tiny', '--port', str(port), '--host', '127.0.0.1']
    options += ['--dtype', 'float32', '--max-model-len', '1024', '--max-num-seqs', '32', '--enforce-eager']
    options += ['--disable-log-stats', '--mm-processor-cache-gb', '0']
    options += ['--logits-processors', 'samtok.grammar:VLLMGrammar']
    command = [sys.executable, '-m', 'vllm.entrypoints.openai.api_server', *options]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            post(port, '/health', timeout=5)
            return process, port
        except OSError:
            time.sleep(0.5)
    process.kill()
    log.seek(0)
    raise RuntimeError('the server did not start: ' + log.read()[-3000:])


@contextmanager
def running_server(path, log_path):
    "Run the server for a while -> process, port."
    with open(log_path, 'w+') as log:
        process, port = start_server(path, log)
        try:
            yield process, port
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def part_server(args, folder):
    "The OpenAI-compatible server."
    good = []
    for model in served_models(folder):
        with running_server(model.path, f'{folder}/{model.family}.log') as (process, port):
            good += ask_server(args, model, port)
            good.append(claim(f'{model.family} server', process.poll() is None, 'still answers after all requests'))
    return good


def ask_server(args, model, port):
    "Ask one server everything."
    from transformers import AutoTokenizer

    from samtok.grammar import vllm_structured
    from samtok.words import MaskVocab

    tokenizer, good, family = AutoTokenizer.from_pretrained(model.path), [], model.family
    start_id = tokenizer.convert_tokens_to_ids(MaskVocab().start)

    def chat(k, **how):
        body = dict(model='tiny', messages=model.asked[k % 8][0], skip_special_tokens=False, **how)
        return post(port, '/v1/chat/completions', body)

    equal = []
    for k in range(8):
        reply = chat(k, temperature=0, max_tokens=24, return_token_ids=True)
        equal.append((reply['prompt_token_ids'], reply['choices'][0]['token_ids']) == model.wanted[k])
    figures = f'{sum(equal)} of 8 prompts and replies have the same tokens'
    good.append(claim(f'{family} server, greedy', all(equal), figures))
    for name, answer, structured, words in constraints(tokenizer):

        def write(seed, structured=structured, words=words):
            how = vllm_structured(*structured, http=True) if structured else dict(vllm_xargs=dict(mask_words=words))
            reply = chat(seed, max_tokens=TOKENS, seed=seed, n=32, logit_bias={str(start_id): LOUD}, **how)
            if 'error' in reply:
                raise RuntimeError(str(reply['error'])[:500])
            return [(c['message']['content'], c['finish_reason'] == 'length') for c in reply['choices']]

        counts = sample(write, args.groups, answer)
        good.append(counted(f'{family} server, {name}', counts, args.groups, may_cut=words is None))
    for words, what in (('{"size": 3}', 'unknown setting'), ('x', 'no JSON')):
        reply = chat(0, max_tokens=4, vllm_xargs=dict(mask_words=words))
        figures = f'status {reply.get("status")}, {str(reply.get("error"))[:120]}'
        good.append(claim(f'{family} server refuses mask_words, {what}', reply.get('status') == 400, figures))
    reply = chat(0, max_tokens=4, vllm_xargs=dict(mask_words='{"codebook_size": 16}'))
    empty = reply.get('choices', [{}])[0].get('message', {}).get('content')
    good.append(claim(f'{family} server, other codebooks than the model has', empty in ('', '<|im_end|>'), repr(empty)))
    return good


# --- TRL


COLOCATE = """
import sys
import torch
from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding
from samtok.grpo import load_params, train
def unpacked(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear
model, out, keep = sys.argv[1:]
if keep == 'unpacked':
    for module in (linear, utils, vocab_parallel_embedding):
        module.dispatch_cpu_unquantized_gemm = unpacked
params = load_params('smoke', model=model, tokenizer='toy', vllm='colocate', steps=2)
train(params, out)
"""


def part_trl(args, folder):
    "GRPO with rollouts by vLLM beside the training: as it is, and with weights that this build does not pack."
    import vllm

    good, model = [], f'{folder}/model'
    make_model(FAMILIES[0], model)
    for keep in ('as it is', 'unpacked'):
        out = f'{folder}/{keep}'
        command = [sys.executable, '-c', COLOCATE, model, out, keep]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        metrics = Path(out, 'metrics.jsonl')
        steps = metrics.read_text().count('"reward"') if metrics.exists() else 0
        lines = (done.stdout + done.stderr).splitlines()
        errors = [line for line in lines if re.search(r'\w(Error|Exception)\b.*:', line)] or lines[-1:]
        figures = f'{steps} steps' if not done.returncode else f'does not run: {errors[-1][:300]}'
        # the CPU build packs its weights when it loads them and then cannot take new ones: known, and said
        known = keep == 'as it is' and 'weight_loader' in figures
        good.append(claim(f'GRPO, vLLM {vllm.__version__} colocate, {keep}', known or steps == 2, figures))
    return good


PARTS = dict(walks=part_walks, engine=part_engine, server=part_server, trl=part_trl)


def prepare():
    "Where torchvision was built for another torch, declare its operators: they are not used, but it names them."
    done = subprocess.run([sys.executable, '-c', 'import torchvision'], capture_output=True, text=True)
    if 'torchvision::nms does not exist' in done.stderr:
        import sysconfig

        schema = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
        lines = ['', '', 'if not _has_ops():', '    _declared = torch.library.Library("torchvision", "DEF")']
        lines += [f'    _declared.define("{name}{schema}")' for name in ('nms', 'qnms')]
        with open(f'{sysconfig.get_paths()["purelib"]}/torchvision/extension.py', 'a') as file:
            file.write('\n'.join([*lines, '']))
    subprocess.run([sys.executable, '-c', 'import torchvision, vllm, xgrammar'], check=True, capture_output=True)


def environment():
    "What vLLM needs to know on a CPU with few cores, and nothing from a hub."
    threads = {k: '1' for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    offline = dict(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', VLLM_NO_USAGE_STATS='1', VLLM_LOGGING_LEVEL='ERROR')
    cpu = dict(VLLM_CPU_KVCACHE_SPACE='1', VLLM_CPU_OMP_THREADS_BIND='nobind', VLLM_ENABLE_V1_MULTIPROCESSING='0')
    return {**os.environ, **threads, **offline, **cpu, 'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'ignore'}


def main():
    "Run each part in a process of its own."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', choices=[*PARTS, []], default=[])
    parser.add_argument('--groups', type=int, default=1000, help='sampled groups of each constraint at least')
    parser.add_argument('--walks', type=int, default=10_000, help='walks over the tokens that xgrammar allows')
    parser.add_argument('--prepare', action='store_true', help='mend a fresh virtual environment, run nothing')
    parser.add_argument('--inside', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        return prepare()
    if args.inside:
        with tempfile.TemporaryDirectory() as folder:
            good = PARTS[args.parts[0]](args, folder)
        sys.exit(0 if all(good) else 1)
    failed = []
    for part in args.parts or PARTS:
        inside = [sys.executable, __file__, part, '--inside', '--groups', str(args.groups), '--walks', str(args.walks)]
        try:
            if subprocess.run(inside, env=environment(), timeout=LIMITS[part]).returncode:
                failed.append(part)
        except subprocess.TimeoutExpired:
            claim(part, False, f'not done after {LIMITS[part]} s')
            failed.append(part)
    print(f'{"failed: " + ", ".join(failed) if failed else "All parts hold."}')
    sys.exit(bool(failed))


if __name__ == '__main__':
    main()
