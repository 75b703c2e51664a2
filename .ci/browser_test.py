#!/usr/bin/env python
"""The widgets in a real browser: `make browser-test`.

Starts JupyterLab on a free port, with a notebook that shows every widget on the toy, and drives headless Chromium over its own protocol (DevTools).
Each widget is used as a hand would use it, what has to change is waited for, and a small picture goes to nbs/images/widgets/. The last step restarts the kernel and looks for the sentence that says so.
Without a browser the test says so and is skipped.
"""

import base64
import io
import json
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[1]
OUT, MAX_KB = ROOT / 'nbs/images/widgets', 80
BROWSERS = (
    'chromium',
    'chromium-browser',
    'chromium-headless-shell',
    'google-chrome',
    'google-chrome-stable',
    'chrome',
)
CELLS = [
    """import json
from pathlib import Path
import numpy as np
from samtok.runs import Run
from samtok.tokenizer import MaskTokenizer
from samtok.widgets import CodebookExplorer, MaskPicker, ReplyInspector, RunDashboard
from samtok.toy.shapeworld import ShapeWorld
tokenizer = MaskTokenizer.from_pretrained('toy')""",
    'picker = MaskPicker(tokenizer=tokenizer)\npicker',
    'explorer = CodebookExplorer(tokenizer=tokenizer)\nexplorer',
    """scene = ShapeWorld(1, 'heldout').sample(0)
said = tokenizer.encode_words(scene.image, scene.masks[[0, 5, 1]])
reply = f'The ring {said[0]} is below the diamond {said[1]}, right of the letter {said[2].split("|>")[0]}|>{said[2].split("|>")[1]}|><|mt_end|>.'
inspector = ReplyInspector(reply, scene.image, tokenizer)
inspector""",
    """quick, slow = (Run(f'runs/{name}', dict(lr=lr)) for name, lr in (('quick', 1e-3), ('slow', 1e-4)))
for s in range(0, 200, 5): quick.log(s, loss=float(np.exp(-s / 40)), iou=float(1 - np.exp(-s / 60)))
for s in range(0, 80, 5): slow.log(s, loss=float(np.exp(-s / 160)), iou=float(1 - np.exp(-s / 200)))
quick.save_result({}, n=1, seconds=1)
board = RunDashboard('runs', every=.3)
board""",
]

# ---------------------------------------------------------------- processes


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextmanager
def started(command, **kwargs):
    "Run a process; at the end, end it and what it started."
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **kwargs
    )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def until(found, what, seconds=60.0):
    "Wait for something true, or fail with a sentence."
    end = time.time() + seconds
    while time.time() < end:
        try:
            if value := found():
                return value
        except OSError:
            pass
        time.sleep(0.03)
    raise AssertionError(f'{what} did not happen within {seconds:.0f} s.')


def jupyter(folder, port, token):
    env = {
        **os.environ,
        'JUPYTER_CONFIG_DIR': f'{folder}/config',
        'JUPYTER_DATA_DIR': f'{folder}/data',
        'JUPYTER_RUNTIME_DIR': f'{folder}/runtime',
        'IPYTHONDIR': f'{folder}/ipython',
        'JUPYTERLAB_SETTINGS_DIR': f'{folder}/settings',
        'PYTHONPATH': f'{ROOT}:{os.environ.get("PYTHONPATH", "")}',
        'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
    }
    env.pop('CI', None)  # here somebody uses the widgets
    command = [
        sys.executable,
        '-m',
        'jupyterlab',
        '--no-browser',
        '--ip=127.0.0.1',
        f'--port={port}',
        '--ServerApp.port_retries=0',
        f'--IdentityProvider.token={token}',
        f'--ServerApp.root_dir={folder}/work',
        '--LabApp.expose_app_in_browser=True',
    ] + ['--allow-root'] * (os.name == 'posix' and os.geteuid() == 0)
    return started(command, env=env, cwd=f'{folder}/work')


def chromium(path, folder):
    command = [
        path,
        '--headless=new',
        '--remote-debugging-port=0',
        '--remote-allow-origins=*',
        f'--user-data-dir={folder}/browser',
        '--window-size=1060,1400',
        '--hide-scrollbars',
        '--disable-gpu',
        '--disable-quic',
        '--no-first-run',
        '--disable-background-networking',
        '--disable-component-update',
        '--disable-sync',
        '--disable-dev-shm-usage',
    ] + ['--no-sandbox'] * (os.name == 'posix' and os.geteuid() == 0)
    return started([*command, 'about:blank'])


# ---------------------------------------------------------------- the browser


class Page:
    "A page of the browser, driven over DevTools."

    def __init__(self, folder):
        from websocket import create_connection  # comes with JupyterLab

        port = until(
            lambda: (Path(folder) / 'browser/DevToolsActivePort').read_text().splitlines()[0],
            'The start of the browser',
        )
        pages = until(
            lambda: [p for p in json.load(urlopen(f'http://127.0.0.1:{port}/json', timeout=10)) if p['type'] == 'page'],
            'A page of the browser',
        )
        self.socket, self.number = (
            create_connection(pages[0]['webSocketDebuggerUrl'], timeout=60, suppress_origin=True),
            0,
        )

    def send(self, method, **params):
        self.number += 1
        self.socket.send(json.dumps(dict(id=self.number, method=method, params=params)))
        while (reply := json.loads(self.socket.recv())).get('id') != self.number:
            pass
        if 'error' in reply:
            raise AssertionError(f'{method}: {reply["error"]["message"]}')
        return reply['result']

    def js(self, code):
        "Evaluate JavaScript; promises are awaited."
        result = self.send('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        if 'exceptionDetails' in result:
            raise AssertionError(
                f'{code[:80]}: {result["exceptionDetails"].get("exception", {}).get("description", "")[:300]}'
            )
        return result['result'].get('value')

    def box(
        self, where
    ):  # CSS selector -> x, y, width, height on the screen, scrolled into view, when nothing moves any more
        look = f"(() => {{const e = document.querySelector({json.dumps(where)}); if (!e) return null; e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]}})()"
        seen = [None]

        def still():
            seen.append(self.js(look))
            time.sleep(0.1)
            return seen[-1] if seen[-1] and seen[-3:] == [seen[-1]] * 3 else None

        return until(still, f'{where} in its place', 20)

    def drag(self, points):
        "Press at the first point, move through the others, let go at the last one."
        for i, (x, y) in enumerate(points):
            self.send(
                'Input.dispatchMouseEvent',
                type='mousePressed' if i == 0 else 'mouseMoved',
                x=x,
                y=y,
                button='left',
                buttons=1,
                clickCount=1,
            )
        self.send(
            'Input.dispatchMouseEvent',
            type='mouseReleased',
            x=points[-1][0],
            y=points[-1][1],
            button='left',
            clickCount=1,
        )

    def click(self, where):
        x, y, w, h = self.box(where)
        self.drag([(x + w / 2, y + h / 2)])

    def picture(self, where, file, colors=128):
        "Save what an element shows as a small PNG."
        from PIL import Image

        time.sleep(0.5)  # strokes fade, pictures load
        x, y, w, h = self.box(where)
        sx, sy = self.js('[scrollX, scrollY]')
        shot = self.send(
            'Page.captureScreenshot', format='png', clip=dict(x=x + sx, y=y + sy, width=w, height=h, scale=1)
        )
        image = Image.open(io.BytesIO(base64.b64decode(shot['data']))).convert('RGB')
        if image.width > 900:
            image = image.resize((900, round(image.height * 900 / image.width)), Image.LANCZOS)
        while True:
            image.quantize(colors, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(
                out := io.BytesIO(), 'png', optimize=True
            )
            if out.tell() <= MAX_KB * 1000 or colors <= 8:
                break
            colors = colors * 3 // 4
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / file).write_bytes(out.getvalue())


# ---------------------------------------------------------------- what is tried


def words(page, where):
    return page.js(f"document.querySelector({json.dumps(where)})?.innerText.match(/<\\|mt_\\d+\\|>/g)?.join('') || ''")


def changed(page, what, before, seconds=20.0):
    "Wait until a function of the page gives something new -> it, milliseconds."
    start = time.perf_counter()
    value = until(lambda: (v := what()) != before and v, 'A change on the screen', seconds)
    return value, 1000 * (time.perf_counter() - start)


def pick(page):
    "Draw around the blue ring and the letter, in turn."
    x, y, w, h = page.box('.samtok-live canvas')
    ring = [
        (x + w * (0.825 + 0.108 * math.cos(a / 12 * math.pi)), y + h * (0.372 + 0.108 * math.sin(a / 12 * math.pi)))
        for a in range(25)
    ]
    page.drag(ring)
    at = '.cell-1 .samtok-live'
    said, _ = changed(page, lambda: words(page, at), '')
    assert said.count('mt_') == 2, said
    letter, times = (
        [(x + w * a, y + h * b) for a, b in ((0.16, 0.14), (0.36, 0.14), (0.36, 0.42), (0.16, 0.42), (0.16, 0.14))],
        [],
    )
    for stroke in (letter, ring) * 3:
        page.drag(stroke)
        said, ms = changed(page, lambda: words(page, at), said)
        times.append(ms)
    page.picture(at, 'picker.png')
    return f'{said}; from lifting the pointer to the new words {sorted(times)[3]:.0f} ms (the middle of six, at most {max(times):.0f})'


def explore(page):
    "Take the third neighbour of the first word."
    at = '.cell-2 .samtok-live'
    before = words(page, at)
    page.click(f'{at} .widget-hbox > .widget-vbox:nth-child(3) > .samtok-step')
    after, ms = changed(page, lambda: words(page, at), before)
    page.picture(at, 'explorer.png')
    return f'{before} to {after}, {ms:.0f} ms'


def inspect(page):
    "Choose the published repair in the list."
    at, choose = (
        '.cell-3 .samtok-live',
        "(i, n) => {const s = document.querySelectorAll('.cell-3 .samtok-live select')[i]; s.value = n; s.dispatchEvent(new Event('change', {bubbles: true}))}",
    )
    assert page.js(f"document.querySelectorAll('{at} ins').length") == 0
    page.js(f"({choose})(0, 'published_gcg')")
    page.js(f"({choose})(1, 'published')")
    _, ms = changed(page, lambda: page.js(f"document.querySelectorAll('{at} ins').length"), 0)
    until(lambda: page.js(f"document.querySelectorAll('{at} img').length") == 4, 'A third mask')
    page.picture(at, 'inspector.png')
    return f'one part was mended, three masks are shown, {ms:.0f} ms'


def follow(page, work):
    "Write to a run from outside of the kernel and see it on the screen."
    at = '.cell-4 .samtok-live'
    until(lambda: page.js(f"!!document.querySelector('{at} table')"), 'The table of runs')
    page.box(at)
    shutil.copy(ROOT / 'data/shapeworld/scene_0.png', work / 'runs/slow/step_150.png')
    with open(work / 'runs/slow/metrics.jsonl', 'a') as f:
        for s in range(80, 155, 5):
            f.write(json.dumps(dict(step=s, loss=math.exp(-s / 160), iou=1 - math.exp(-s / 200))) + '\n')
    (work / 'runs/slow/samples.jsonl').write_text(
        json.dumps(dict(id='scene 7', reply='the ring <|mt_start|><|mt_0115|><|mt_0403|><|mt_end|>')) + '\n'
    )
    until(
        lambda: (
            '150' in page.js(f"document.querySelector('{at} table').innerText")
            and 'scene 7' in page.js(f"document.querySelector('{at}').innerText")
        ),
        'The new rows of the run on the screen',
    )
    page.picture(at, 'dashboard.png')
    return 'rows and a sample that were written by another process are shown'


def restart(page):
    "Restart the kernel without running anything again."
    gone = "[...document.querySelectorAll('.cell-1 .samtok-live .samtok-gone')].some(e => e.offsetParent)"
    assert not page.js(gone), 'The widget says that the kernel is gone while it is there.'
    page.js(
        "[...jupyterapp.shell.widgets('main')][0].context.sessionContext.session.kernel.restart(); 1"
    )  # as the menu does, without its question
    until(lambda: page.js(gone), 'The sentence about the kernel')
    page.picture('.cell-1 .samtok-live', 'restarted.png')
    return 'the widget says that the kernel is gone'


def reopen(page, url, api):
    "Load the page anew: the still picture stands in for the view."
    page.js("jupyterapp.commands.execute('docmanager:save')")

    def none_left():
        for session in json.load(urlopen(api('/api/sessions'))):
            urlopen(Request(api(f'/api/sessions/{session["id"]}'), method='DELETE'))
        return not json.load(urlopen(api('/api/sessions')))

    until(none_left, 'The end of the kernel')
    page.send('Page.navigate', url=url)
    until(
        lambda: page.js(
            "[...document.querySelectorAll('.samtok-still img')].filter(e => e.offsetParent).length >= 1 && [...document.querySelectorAll('.samtok-still .samtok-gone')].some(e => e.offsetParent)"
        ),
        'The still picture with its sentence',
    )
    return 'the still pictures stand in for the views'


MARK = "document.querySelectorAll('.jp-Notebook .jp-Cell').forEach((c, i) => c.classList.add('cell-' + i))"


def run(browser, folder):
    import nbformat

    port, token, work = free_port(), secrets.token_hex(16), Path(folder) / 'work'
    work.mkdir()
    (news := Path(folder) / 'settings/@jupyterlab/apputils-extension').mkdir(parents=True)
    (news / 'notification.jupyterlab-settings').write_text('{"fetchNews": "false"}')  # no question over the pictures
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(c) for c in CELLS],
            metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
        ),
        work / 'widgets.ipynb',
    )

    def api(path):
        return f'http://127.0.0.1:{port}{path}?token={token}'

    with jupyter(folder, port, token) as server, chromium(browser, folder):
        until(lambda: urlopen(api('/api/status')).status == 200, 'The start of JupyterLab', 90)
        page, url = Page(folder), api('/doc/tree/widgets.ipynb') + '&reset'
        page.send('Page.enable')
        page.send('Page.navigate', url=url)
        until(
            lambda: page.js("!!window.jupyterapp && document.querySelectorAll('.jp-Notebook .jp-Cell').length"),
            'The notebook in JupyterLab',
            90,
        )
        until(
            lambda: page.js(
                "[...window.jupyterapp.shell.widgets('main')][0]?.context?.sessionContext?.session?.kernel?.connectionStatus == 'connected'"
            ),
            'The kernel',
            60,
        )
        page.js("jupyterapp.commands.execute('notebook:run-all-cells').then(() => 1)")
        page.js(MARK)
        until(lambda: page.js("document.querySelectorAll('.samtok-live').length") == 4, 'All four widgets', 120)
        until(
            lambda: {k['execution_state'] for k in json.load(urlopen(api('/api/kernels')))} == {'idle'},
            'The end of the cells',
            60,
        )
        passed = 0
        for what, tried in dict(
            MaskPicker=lambda: pick(page),
            CodebookExplorer=lambda: explore(page),
            ReplyInspector=lambda: inspect(page),
            RunDashboard=lambda: follow(page, work),
            restart=lambda: restart(page),
            reopen=lambda: reopen(page, url, api),
        ).items():
            page.js(MARK)
            print(f'pass  {what}: {tried()}', flush=True)
            passed += 1
    return passed


def main():
    browser = os.environ.get('BROWSER_PATH') or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        print(
            'skipped: no Chromium or Chrome was found; install one, or name it with BROWSER_PATH=..., to try the widgets in a browser.'
        )
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # whoever ends the test ends its browser and its server too
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            print(f'{run(browser, folder)} passed, 0 failed')
        except Exception as e:  # sockets and servers fail in many ways
            if not isinstance(e, AssertionError):
                traceback.print_exc()
            print(f'FAIL  {e}\n0 passed, 1 failed')
            return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
