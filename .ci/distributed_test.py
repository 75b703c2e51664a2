"""Two processes on the CPU share a model in every way: train, kill, resume, read again (make distributed-test).

The tokenizer's training, which shares no weights, is killed and resumed as well: it must end as if it had not been.
"""

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from samtok.checkpoints import CheckpointError, check_saved, expected_tensors
from samtok.runs import data_file, read_json, read_rows
from samtok.vlm import MaskVLM, VLMError

ROOT = Path(__file__).resolve().parent.parent
LOG = dict(sft='RunLog', grpo='RewardLog')  # the callback of a run, by module
SHARED = {
    'DDP': {},
    'FSDP2': dict(fsdp='full_shard'),
    'ZeRO-2': dict(deepspeed='params/zero2.json'),
    'ZeRO-3': dict(deepspeed='zero3_all.json'),
}
LORA = dict(lora_r=4, lora_alpha=8)
SAME = dict(scale='smoke', gpus=2, device='cpu', steps=4, log_every=1, checkpoint_every=2, bf16=False, eval_n=0)
TOKENIZER = dict(  # codebooks are placed before step 4, checkpoints are written after steps 5 and 10
    scale='smoke',
    gpus=2,
    device='cpu',
    steps=12,
    log_every=1,
    checkpoint_every=5,
    images_per_step=2,
    start_batches=4,
    eval_scenes=4,
)
# steps of grpo sample from the policy, and each process draws its own: there the losses have no reference
OWN = dict(sft=dict(batch=2, warmup=1), grpo=dict(replies=4, batch=8, max_new_tokens=12))


def asked(processor):  # -> dict of tensors: a drawn scene and a question about it
    from samtok.toy.shapeworld import ShapeWorld, render

    content = [dict(type='image'), dict(type='text', text='Where is the ring?')]
    ask = [dict(role='user', content=content)]
    text = processor.apply_chat_template(ask, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=[render(ShapeWorld(60, 'heldout').scene(7))], return_tensors='pt')


def worker(name, argv):
    "Be one rank of a run: keep the logits of its trainer, die where KILL_AT says, spoil weights where POISON says."
    module = importlib.import_module(f'samtok.{name}')
    if name == 'train_tokenizer':
        module.Trainer = mortal(module.Trainer)
    else:
        setattr(module, LOG[name], witness(getattr(module, LOG[name])))
    sys.argv = [f'samtok.{name}', *argv]
    module.main()


def mortal(trainer):  # Trainer of train_tokenizer -> the same, of which rank KILL_RANK dies within step KILL_AT
    class Mortal(trainer):
        def _try_batch(self, batches, quantize):
            terms = super()._try_batch(batches, quantize)  # weights and codebooks have moved, self.step has not
            rank = self.accelerator.process_index
            if (self.step + 1, rank) == tuple(int(os.environ.get(k, -1)) for k in ('KILL_AT', 'KILL_RANK')):
                os.kill(os.getpid(), signal.SIGKILL)
            return terms

    return Mortal


def witness(callback):  # class of a run's callback -> the same, which keeps what the trained model answers
    class Witness(callback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == int(os.environ.get('POISON', -1)):
                next(model.parameters()).data.fill_(float('nan'))

        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == int(os.environ.get('KILL_AT', -1)):
                os.kill(os.getpid(), signal.SIGKILL)

        def on_train_end(self, args, state, control, model=None, processing_class=None, **kwargs):
            inputs = asked(processing_class)
            was = model.training
            with torch.no_grad():
                logits = model.eval()(**inputs).logits
            model.train(was)
            if self.run.main:
                torch.save(dict(inputs=dict(inputs), logits=logits), self.run.path / 'witness.pt')

    return Witness


def run(name, out, params, limit, **env):  # -> exit code, output of both processes
    "Start a run with torchrun."
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    options = [part for k, v in dict(params, out=out).items() for part in (f'--{k}', str(v))]
    command = [*torchrun, str(Path(__file__).resolve()), 'worker', name, *options]
    env = os.environ | dict(OMP_NUM_THREADS='1', DS_ACCELERATOR='cpu', PYTHONPATH=str(ROOT)) | env
    with open(f'{out}.log', 'ab') as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = f'no end in {limit} s'
    return code, Path(f'{out}.log').read_text(errors='replace')


def apart(rows, others):  # records of two runs -> the largest relative difference of their losses; inf: other steps
    losses = [{r['step']: r['loss'] for r in found if 'loss' in r} for found in (rows, others)]
    if losses[0].keys() != losses[1].keys() or not losses[0]:
        return float('inf')
    return max(abs(a - losses[1][step]) / a for step, a in losses[0].items())


def one_way(name, way, learn, out, reference, limit):  # -> a line of the table
    "Train, kill after step 3, type the same command again; compare what is saved with what was trained."
    params = SAME | OWN[name] | SHARED[way] | dict(learn=learn) | (LORA if learn != 'full' else {})
    if way == 'ZeRO-3':
        params['deepspeed'] = str(out.parent / SHARED[way]['deepspeed'])
    started = time.time()
    killed, _ = run(name, out, params, limit, KILL_AT='3')
    code, text = run(name, out, params, limit)
    line = dict(module=name, way=way, learn=learn, seconds=round(time.time() - started))
    if killed == 0 or code != 0:
        return line | dict(problem=f'codes {killed}, {code}: {text[-1500:]}')
    try:
        witness = torch.load(out / 'witness.pt')
        vlm = MaskVLM.from_pretrained(out / 'vlm')
        line['tensors'] = check_saved(out / 'vlm', expected_tensors(vlm.model))['tensors']
    except (OSError, CheckpointError, VLMError) as e:
        return line | dict(problem=str(e))
    with torch.no_grad():
        logits = vlm.model.eval()(**witness['inputs']).logits
    line['logits_apart'] = ((logits - witness['logits']).abs().max() / logits.abs().max()).item()
    rows = read_rows(out / 'metrics.jsonl')
    wrong = [] if [r['step'] for r in rows] == [1, 2, 3, 4] else ['steps are missing']
    wrong += ['the saved model gives other logits'] * (line['logits_apart'] > 1e-4)
    if reference:
        line['loss_apart'] = apart(reference, rows)
        wrong += ['other losses than one process'] * (not line['loss_apart'] < 1e-4)
    return line | dict(problem='; '.join(wrong))


def tokenizer_resumed(out, limit):  # -> lines of the table
    "Train a tokenizer without a kill; then kill one rank, type the same command again: it must end bit for bit alike."
    from safetensors.torch import load_file

    from samtok.train_tokenizer import same_metrics

    def ended(folder):
        return read_rows(folder / 'metrics.jsonl'), load_file(folder / 'tokenizer' / 'model.safetensors')

    code, text = run('train_tokenizer', out / 'tokenizer_whole', TOKENIZER, limit)
    if code:
        return [dict(module='train_tokenizer', way='whole', problem=f'code {code}: {text[-1500:]}')]
    rows, weights = ended(out / 'tokenizer_whole')
    lines = []
    for step, rank in ((3, 0), (8, 1), (11, 0)):  # before the first checkpoint, after it, after a second one
        way, started = f'rank {rank} killed in step {step}', time.time()
        folder = out / f'tokenizer_{step}_{rank}'
        killed, _ = run('train_tokenizer', folder, TOKENIZER, limit, KILL_AT=str(step), KILL_RANK=str(rank))
        kept = sorted(file.name for file in folder.glob('checkpoint_*'))
        code, text = run('train_tokenizer', folder, TOKENIZER, limit)
        line = dict(module='train_tokenizer', way=way, seconds=round(time.time() - started), kept=len(kept))
        if killed == 0 or code:
            lines.append(line | dict(problem=f'codes {killed}, {code}: {text[-1500:]}'))
            continue
        again, found = ended(folder)
        line['metrics_apart'] = same_metrics(rows, again)
        line['weights_that_differ'] = sum(not torch.equal(found[k], v) for k, v in weights.items())
        wrong = ['other weights'] * (found.keys() != weights.keys() or line['weights_that_differ'] > 0)
        wrong += ['other metrics'] * (line['metrics_apart'] != 0)
        wrong += [f'{len(kept)} checkpoints were left by the kill'] * (len(kept) != 2 * (step > 5) + 2 * (step > 10))
        lines.append(line | dict(problem='; '.join(wrong)))
    return lines


def refused(out, limit):  # -> problems: what cannot work must end with a sentence before anything is written
    problems = []
    for way, learn, sentence in (
        ('FSDP2', 'lora', 'take lora_full_rows'),
        ('ZeRO-3', 'lora', 'take lora_full_rows'),
        ('FSDP2', 'rows', 'take lora_full_rows'),
    ):
        params = SAME | OWN['sft'] | SHARED[way] | dict(learn=learn) | LORA
        if way == 'ZeRO-3':
            params['deepspeed'] = str(out.parent / SHARED[way]['deepspeed'])
        code, text = run('sft', out, params, limit)
        if code == 0 or sentence not in text or out.exists():
            problems.append(f'{way} with {learn} was not refused: {text[-500:]}')
    params = SAME | OWN['sft'] | SHARED['ZeRO-2']
    code, text = run('sft', out, params, limit, POISON='2')
    if code == 0 or 'DeepSpeed has applied it' not in text:
        problems.append(f'a gradient that is not finite was not named: {text[-1500:]}')
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', default=str(ROOT / 'runs' / 'distributed'), help='folder of the runs; it is emptied')
    parser.add_argument('--modules', default='train_tokenizer,sft,grpo')
    parser.add_argument('--ways', default=','.join(SHARED))
    parser.add_argument('--minutes', type=float, default=45, help='time for everything')
    args = parser.parse_args()
    out, ends = Path(args.out), time.time() + 60 * args.minutes
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    zero3 = read_json(data_file('params', 'zero3.json'))
    zero3['zero_optimization']['stage3_param_persistence_threshold'] = 0  # else tiny weights stay whole
    (out / SHARED['ZeRO-3']['deepspeed']).write_text(json.dumps(zero3))
    table, problems = [], []
    modules = args.modules.split(',')
    if 'train_tokenizer' in modules:
        modules.remove('train_tokenizer')
        table += tokenizer_resumed(out, 300)
        print(*map(json.dumps, table), sep='\n', flush=True)
    for name in modules:
        for learn in ('full', 'lora'):
            reference = {}
            for way in args.ways.split(','):
                kind = 'lora_full_rows' if learn == 'lora' and way in ('FSDP2', 'ZeRO-3') else learn
                if time.time() > ends:
                    problems.append(f'{name} {way} {kind}: no time left')
                    continue
                if name == 'sft' and kind not in reference:  # one process with both halves of the batch
                    from samtok import sft

                    alone = SAME | OWN[name] | dict(learn=kind, gpus=0, batch=4) | (LORA if kind != 'full' else {})
                    folder = out / f'sft_alone_{kind}'
                    sft.train(sft.load_params(**alone), folder)
                    reference[kind] = read_rows(folder / 'metrics.jsonl')
                line = one_way(name, way, kind, out / f'{name}_{way}_{kind}', reference.get(kind), 300)
                print(json.dumps(line), flush=True)
                table.append(line)
    if modules and 'ZeRO-3' in args.ways:
        problems += refused(out / 'refused', 300)
    for line in table:
        if line['problem']:
            problems.append(f'{line["module"]} {line["way"]} {line.get("learn", "")}: {line["problem"]}')
    (out / 'table.json').write_text(json.dumps(table, indent=1))
    for problem in problems:
        print(problem)
    print(f'{len(table)} ways, {len(problems)} problems')
    return bool(problems)


if __name__ == '__main__':
    if sys.argv[1:2] == ['worker']:
        worker(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
