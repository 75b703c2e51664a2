"""Kill every kind of run, at random moments and while it writes, and compare its end with the run that was not killed.

python .ci/chaos.py [--kills 100] [--seed 0] [--only sft,grpo] [--out runs/chaos]

Of each run the parent process gets a signal 9 (now and then 15), sometimes when a file of its folder has just changed;
after some kills the newest checkpoint is cut in half. Then the same command is started again, until it ends by itself.
Where the checkpoint that was cut is the only one, a sentence must ask to restore it, and it is restored.
It must end with the metrics and files of the run that was not killed, and after no kill may a process be left over.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
MARK = 'SAMTOK_CHAOS'  # an environment variable that all processes of one start inherit
CLOCKS = {'time', 'seconds', 'seconds_per_step', 'images_per_second', 'started', 'commit', 'command', 'environment'}
WAIT = 20  # seconds after a kill until every process of the run must have ended

SMALL = ['--eval_n', '4']
RUNS = {  # name -> module, options, its share of the kills
    'tokenizer': ('samtok.train_tokenizer', ['--scale', 'smoke', '--steps', '20', '--checkpoint_every', '5'], 4),
    'tokenizer_2': (
        'samtok.train_tokenizer',
        '--scale smoke --steps 20 --checkpoint_every 5 --gpus 2 --device cpu --images_per_step 2'.split(),
        2,
    ),
    'tokenise': (
        'samtok.shards',
        ['--data', 'shapeworld', '--args', '{"n": 96}', '--tokenizer', 'toy/tokenizer_16', '--shard', '8'],
        4,
    ),
    'sft': ('samtok.sft', ['--scale', 'smoke', '--steps', '12', '--checkpoint_every', '3', *SMALL], 5),
    'sft_2': (
        'samtok.sft',
        '--scale smoke --steps 12 --checkpoint_every 3 --gpus 2 --device cpu --batch 4'.split() + SMALL,
        2,
    ),
    'grpo': ('samtok.grpo', ['--scale', 'smoke', '--checkpoint_every', '1', *SMALL], 3),
    'evaluate': ('samtok.evaluate', ['--model', 'toy', '--task', 'toy_res', '--n', '48'], 4),
    'sweep': ('samtok.sweep', ['{folder}/small.ipynb', 'x=1,2,3'], 3),
}
SMALL_RUN = """from samtok.runs import Run
import time
run = Run(out, dict(x=x))
if not run.skip():
    with run.hold():
        run.truncate(-1)
        for step in range(8):
            run.log(step, loss=x / (step + 1))
            time.sleep(0.3)
        run.save_result(dict(loss=x / 8), n=8, seconds=2.4)"""


def write_notebook(path):
    "A run notebook of seconds, for sweeps."
    head = dict(cell_type='code', id='a', execution_count=None, outputs=[], metadata=dict(tags=['parameters']))
    body = dict(head, id='b', metadata={}, source=SMALL_RUN)
    cells = [dict(head, source="x: int = 0  # a number\nout: str = ''  # run folder"), body]
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    path.write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))


def start(name, out, mark):
    "Start a run in a session of its own, its text in a file beside its folder."
    module, options, _ = RUNS[name]
    options = [option.format(folder=out.parent) if option.startswith('{folder}') else option for option in options]
    env = {**os.environ, MARK: mark, 'OMP_NUM_THREADS': '1', 'CI': '1', 'PYTHONPATH': str(ROOT)}
    with open(f'{out}.log', 'ab') as log:
        return subprocess.Popen(
            [sys.executable, '-m', module, *options, '--out', str(out)],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def alive(mark):
    "Processes that have the mark in their environment."
    found, wanted = [], f'{MARK}={mark}'.encode()
    for entry in Path('/proc').iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                state = (entry / 'stat').read_text().rpartition(')')[2].split()[0]
                if state != 'Z' and wanted in (entry / 'environ').read_bytes().split(b'\0'):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def changed(out):
    "What a folder holds now: names, sizes and times."
    found = set()
    for path in out.rglob('*'):
        try:
            state = path.stat()
        except OSError:
            continue
        found.add((str(path), state.st_size, state.st_mtime_ns))
    return found


def wait_to_kill(process, out, seconds, rng):
    "Wait for a random moment, or for a random change in the folder; False where the run ended by itself before."
    end = time.monotonic() + rng.uniform(0, seconds)
    changes = rng.randrange(1, 12) if rng.random() < 0.5 else 0
    before = changed(out)
    while process.poll() is None:
        if not changes and time.monotonic() > end:
            return True
        if changes:
            now = changed(out)
            if now != before:
                before, changes = now, changes - 1
                if not changes:
                    return True
            if time.monotonic() > end + seconds:
                return True
        time.sleep(0.003 if changes else 0.05)
    return False


REFUSED = 'and there is no other one that is whole: restore it'  # what a run says to its only checkpoint when it is cut


def restore(cut):
    "Put back the files that are still cut, of dict path -> content -> how many."
    still = [file for file, content in cut.items() if file.exists() and file.stat().st_size < len(content)]
    for file in still:
        file.write_bytes(cut[file])
    return len(still)


def cut_newest(out, rng):
    "Cut a file of the newest checkpoint in half -> (path, its content), or None where there is none."
    found = [p for p in out.rglob('checkpoint*') if p.is_dir() or p.suffix in ('.pt', '.pth', '.safetensors')]
    if not found:
        return None
    newest = max(found, key=lambda p: p.stat().st_mtime_ns)
    files = [p for p in newest.rglob('*') if p.is_file()] if newest.is_dir() else [newest]
    files = [p for p in files if p.stat().st_size > 1]
    if not files:
        return None
    file = rng.choice(files)
    content = file.read_bytes()
    os.truncate(file, len(content) // 2)
    return file, content


def plain(value):
    "A JSON value without clocks."
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in CLOCKS}
    return [plain(v) for v in value] if isinstance(value, list) else value


def outcome(out):
    "What must be the same: rows of metrics, figures of the result, contents of shards, predictions."
    found = {}
    for file in sorted(out.rglob('*')):
        name = str(file.relative_to(out))
        if not file.is_file() or '.part' in name or 'checkpoints' in name:
            continue
        if file.name == 'result.json':
            found[name] = plain(json.loads(file.read_text()).get('metrics'))
        elif file.name == 'metrics.jsonl':
            found[name] = [plain(json.loads(line)) for line in file.read_text().splitlines()]
        elif file.suffix == '.parquet':
            import pyarrow.parquet as pq

            found[name] = hashlib.sha256(repr(pq.read_table(file).to_pylist()).encode()).hexdigest()
        elif file.suffix == '.jsonl':
            found[name] = sorted(json.dumps(plain(json.loads(line))) for line in file.read_text().splitlines())
    return found


def reference(name, folder):
    "Run once without a kill -> seconds, outcome."
    out, mark, begun = folder / f'{name}_whole', uuid.uuid4().hex, time.monotonic()
    code = start(name, out, mark).wait()
    if code:
        raise SystemExit(f'{name} fails without any kill (code {code}): see {out}.log')
    return time.monotonic() - begun, outcome(out)


def torture(name, folder, kills, seconds, wanted, rng):
    "Kill a run again and again, start new ones until all kills are spent -> problems, and counts."
    problems, count = [], dict(kills=0, runs=0, cut=0, orphans=0)
    while count['kills'] < kills:
        out = folder / f'{name}_{count["runs"]}'
        count['runs'] += 1
        planned = min(kills - count['kills'], rng.randint(1, 4))
        log, cut = [], {}
        while True:
            mark = uuid.uuid4().hex
            process = start(name, out, mark)
            if planned and wait_to_kill(process, out, seconds, rng):
                what = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
                os.kill(process.pid, what)
                process.wait()
                planned -= 1
                count['kills'] += 1
                log.append(what.name)
                end = time.monotonic() + WAIT
                while (left := alive(mark)) and time.monotonic() < end:
                    time.sleep(0.2)
                if left:
                    count['orphans'] += len(left)
                    problems.append(f'{out.name}: {len(left)} processes were left after {what.name}')
                    for pid in left:
                        os.kill(pid, signal.SIGKILL)
                if rng.random() < 0.3 and (found := cut_newest(out, rng)):
                    count['cut'] += 1
                    cut.setdefault(*found)
                    log.append(f'cut {found[0].relative_to(out)}')
                continue
            code = process.wait()
            if code and REFUSED in Path(f'{out}.log').read_text(errors='replace')[-3000:] and restore(cut):
                log.append('restored')
                continue
            break
        if code:
            problems.append(f'{out.name}: after {", ".join(log)} the run ends with code {code}, see {out}.log')
            continue
        got = outcome(out)
        other = [key for key in {*got, *wanted} if got.get(key) != wanted.get(key)]
        if other:
            problems.append(f'{out.name}: after {", ".join(log)} these differ: {", ".join(sorted(other)[:4])}')
        else:
            shutil.rmtree(out)
    return problems, count


def main():
    "Torture all runs, print a table, and end with 1 where something was lost."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', default=','.join(RUNS), help='names of runs, with commas')
    parser.add_argument('--out', default='runs/chaos')
    parser.add_argument('--jobs', type=int, default=2, help='runs that are killed at a time')
    args = parser.parse_args()
    names, folder = args.only.split(','), Path(args.out).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_notebook(folder / 'small.ipynb')
    shares, problems = sum(RUNS[name][2] for name in names), []

    def run(name):
        seconds, wanted = reference(name, folder)
        kills = -(-args.kills * RUNS[name][2] // shares)
        found, count = torture(name, folder, kills, seconds, wanted, random.Random(f'{args.seed} {name}'))
        numbers = count['kills'], count['runs'], count['cut'], count['orphans'], len(found)
        line = f'{name:12}{seconds:9.0f}' + ''.join(f'{n:9}' for n in numbers)
        print(line, *found, sep='\n', flush=True)
        problems.extend(found)
        return np.array(numbers)

    print(
        f'{"run":12}' + ''.join(f'{title:>9}' for title in ('seconds', 'kills', 'runs', 'cut', 'orphans', 'problems'))
    )
    with ThreadPoolExecutor(args.jobs) as pool:
        total = sum(pool.map(run, names))
    print(f'{"all":21}' + ''.join(f'{n:9}' for n in total))
    sys.exit(bool(problems))


if __name__ == '__main__':
    main()
