#!/usr/bin/env python
"""The widgets in a real browser: `make browser-test`.

Starts JupyterLab on a free port, with a notebook that shows every widget on a drawn scene, and drives headless Chromium
over its own protocol (DevTools). Each widget gets the events that a user would cause, the test waits for what has to
change, and a small picture goes to nbs/images/widgets/. The last steps restart the kernel and load the page again: both
times a sentence has to say that the kernel is gone. Without a browser the test says so and is skipped.
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
OUT = ROOT / 'nbs/images/widgets'
MAX_KB = 80  # of a picture
BROWSERS = (
    'chromium',
    'chromium-browser',
    'chromium-headless-shell',
    'google-chrome',
    'google-chrome-stable',
    'chrome',
)
IMPORTS = """import json
from pathlib import Path
import numpy as np
from samtok.runs import Run
from samtok.tokenizer import MaskTokenizer
from samtok.widgets import CodebookExplorer, MaskPicker, ReplyInspector, RunDashboard
from samtok.toy.shapeworld import ShapeWorld
tokenizer = MaskTokenizer.from_pretrained('toy')"""
PICKER = """picker = MaskPicker(tokenizer=tokenizer)
picker"""
EXPLORER = """explorer = CodebookExplorer(tokenizer=tokenizer)
explorer"""
INSPECTOR = """scene = ShapeWorld(1, 'heldout').sample(0)
ring, diamond, letter = tokenizer.encode_words(scene.image, scene.masks[[0, 5, 1]])
start, first, _, end = (word + '|>' for word in letter.split('|>')[:4])  # the second word will be missing
reply = f'The ring {ring} is below the diamond {diamond}, right of the letter {start}{first}{end}.'
inspector = ReplyInspector(reply, scene.image, tokenizer)
inspector"""
DASHBOARD = """quick = Run('runs/quick', dict(lr=1e-3))
slow = Run('runs/slow', dict(lr=1e-4))
for step in range(0, 200, 5):
    quick.log(step, loss=float(np.exp(-step / 40)), iou=float(1 - np.exp(-step / 60)))
for step in range(0, 80, 5):
    slow.log(step, loss=float(np.exp(-step / 160)), iou=float(1 - np.exp(-step / 200)))
quick.save_result({}, n=1, seconds=1)
board = RunDashboard('runs', every=0.3)
board"""
CELLS = [IMPORTS, PICKER, EXPLORER, INSPECTOR, DASHBOARD]

# ---------------------------------------------------------------- processes


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


@contextmanager
def started(command, **kwargs):
    "Run a process; at the end, end it and what it started."
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **kwargs
    )
    try:
        yield
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


def as_root():
    return os.name == 'posix' and os.geteuid() == 0


def jupyter(folder, port, token):
    "Start JupyterLab with settings of its own."
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
    ]
    if as_root():
        command.append('--allow-root')
    return started(command, env=env, cwd=f'{folder}/work')


def chromium(path, folder):
    "Start a browser without a window, with a profile of its own."
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
    ]
    if as_root():
        command.append('--no-sandbox')
    return started([*command, 'about:blank'])


# ---------------------------------------------------------------- the browser

PLACE = """where => {
  const element = document.querySelector(where);
  if (!element) return null;
  element.scrollIntoView({block: 'center'});
  const r = element.getBoundingClientRect();
  return [r.x, r.y, r.width, r.height];
}"""


class Page:
    "A page of the browser, driven over DevTools."

    def __init__(self, folder):
        from websocket import create_connection  # comes with JupyterLab

        def port():
            return (Path(folder) / 'browser/DevToolsActivePort').read_text().splitlines()[0]

        def pages():
            targets = json.load(urlopen(f'http://127.0.0.1:{number}/json', timeout=10))
            return [target for target in targets if target['type'] == 'page']

        number = until(port, 'The start of the browser')
        address = until(pages, 'A page of the browser')[0]['webSocketDebuggerUrl']
        self.socket = create_connection(address, timeout=60, suppress_origin=True)
        self.number = 0  # of the last message

    def send(self, method, **params):
        "Send a command of the protocol -> its result."
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
            what = result['exceptionDetails'].get('exception', {}).get('description', '')
            raise AssertionError(f'{code[:80]}: {what[:300]}')
        return result['result'].get('value')

    def box(self, where):
        "Scroll to a CSS selector -> x, y, width, height on the screen, when nothing moves any more."
        found = [None]

        def still():
            found.append(self.js(f'({PLACE})({json.dumps(where)})'))
            time.sleep(0.1)
            return found[-1] if found[-1] and found[-3:] == [found[-1]] * 3 else None

        return until(still, f'{where} in its place', 20)

    def mouse(self, kind, point, **more):
        x, y = point
        self.send('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1, **more)

    def drag(self, points):
        "Press at the first point, move through the others, let go at the last one."
        self.mouse('mousePressed', points[0], buttons=1)
        for point in points[1:]:
            self.mouse('mouseMoved', point, buttons=1)
        self.mouse('mouseReleased', points[-1])

    def click(self, where):
        "Click on the middle of an element."
        x, y, w, h = self.box(where)
        self.drag([(x + w / 2, y + h / 2)])

    def picture(self, where, file, colors=128):
        "Save what an element shows as a small PNG."
        from PIL import Image

        time.sleep(0.5)  # strokes fade, pictures load
        x, y, w, h = self.box(where)
        left, top = self.js('[scrollX, scrollY]')
        clip = dict(x=x + left, y=y + top, width=w, height=h, scale=1)
        shot = self.send('Page.captureScreenshot', format='png', clip=clip)
        image = Image.open(io.BytesIO(base64.b64decode(shot['data']))).convert('RGB')
        if image.width > 900:
            image = image.resize((900, round(image.height * 900 / image.width)), Image.LANCZOS)
        data = small_png(image, colors)
        while len(data) > MAX_KB * 1000 and colors > 8:
            colors = colors * 3 // 4
            data = small_png(image, colors)
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / file).write_bytes(data)


def small_png(image, colors):  # PIL image, at most so many colours -> bytes of the file
    from PIL import Image

    out = io.BytesIO()
    few = image.quantize(colors, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    few.save(out, 'png', optimize=True)
    return out.getvalue()


# ---------------------------------------------------------------- what is tried


WORDS = """where => {
  const text = document.querySelector(where)?.innerText;
  return text?.match(/<\\|mt_\\d+\\|>/g)?.join('') || '';
}"""
CHOOSE = """(where, i, value) => {
  const list = document.querySelectorAll(where + ' select')[i];
  list.value = value;
  list.dispatchEvent(new Event('change', {bubbles: true}));
}"""
VISIBLE = 'where => [...document.querySelectorAll(where)].filter(e => e.offsetParent).length'
MARK = "document.querySelectorAll('.jp-Notebook .jp-Cell').forEach((c, i) => c.classList.add('cell-' + i))"
NOTEBOOK = "[...window.jupyterapp.shell.widgets('main')][0]"


def call(page, function, *arguments):
    "Call a JavaScript function with values -> its value."
    return page.js(f'({function})({", ".join(map(json.dumps, arguments))})')


def words(page, where):
    return call(page, WORDS, where)


def count(page, where):
    return page.js(f'document.querySelectorAll({json.dumps(where)}).length')


def text(page, where):
    return page.js(f'document.querySelector({json.dumps(where)}).innerText')


def changed(page, what, before, seconds=20.0):
    "Wait until a function of the page gives something new -> it, milliseconds."
    start = time.perf_counter()
    value = until(lambda: (v := what()) != before and v, 'A change on the screen', seconds)
    return value, 1000 * (time.perf_counter() - start)


def pick(page):
    "Draw around the blue ring and the letter, in turn."
    x, y, w, h = page.box('.samtok-live canvas')
    angles = [i / 12 * math.pi for i in range(25)]
    circle = [(0.825 + 0.108 * math.cos(a), 0.372 + 0.108 * math.sin(a)) for a in angles]
    rectangle = [(0.16, 0.14), (0.36, 0.14), (0.36, 0.42), (0.16, 0.42), (0.16, 0.14)]
    ring, letter = ([(x + w * u, y + h * v) for u, v in shape] for shape in (circle, rectangle))
    at = '.cell-1 .samtok-live'
    page.drag(ring)
    shown, _ = changed(page, lambda: words(page, at), '')
    assert shown.count('mt_') == 2, shown
    times = []
    for stroke in (letter, ring) * 3:
        page.drag(stroke)
        shown, ms = changed(page, lambda: words(page, at), shown)
        times.append(ms)
    page.picture(at, 'picker.png')
    middle, longest = sorted(times)[3], max(times)
    return (
        f'{shown}; from lifting the pointer to the new words {middle:.0f} ms (the middle of six, at most {longest:.0f})'
    )


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
    at = '.cell-3 .samtok-live'
    assert count(page, f'{at} ins') == 0
    call(page, CHOOSE, at, 0, 'published_gcg')
    call(page, CHOOSE, at, 1, 'published')
    _, ms = changed(page, lambda: count(page, f'{at} ins'), 0)
    until(lambda: count(page, f'{at} img') == 4, 'A third mask')
    page.picture(at, 'inspector.png')
    return f'one part was mended, three masks are shown, {ms:.0f} ms'


def follow(page, work):
    "Write to a run from outside of the kernel and see it on the screen."
    at = '.cell-4 .samtok-live'
    until(lambda: count(page, f'{at} table'), 'The table of runs')
    page.box(at)
    run = work / 'runs/slow'
    shutil.copy(ROOT / 'data/shapeworld/scene_0.png', run / 'step_150.png')
    with open(run / 'metrics.jsonl', 'a') as file:
        for step in range(80, 155, 5):
            metrics = dict(step=step, loss=math.exp(-step / 160), iou=1 - math.exp(-step / 200))
            file.write(json.dumps(metrics) + '\n')
    sample = dict(id='scene 7', reply='the ring <|mt_start|><|mt_0115|><|mt_0403|><|mt_end|>')
    (run / 'samples.jsonl').write_text(json.dumps(sample) + '\n')
    until(
        lambda: '150' in text(page, f'{at} table') and 'scene 7' in text(page, at),
        'The new records of the run on the screen',
    )
    page.picture(at, 'dashboard.png')
    return 'records and a sample that were written by another process are shown'


def restart(page):
    "Restart the kernel without running anything again."
    gone = '.cell-1 .samtok-live .samtok-gone'
    assert not call(page, VISIBLE, gone), 'The widget says that the kernel is gone while it is there.'
    page.js(f'{NOTEBOOK}.context.sessionContext.session.kernel.restart(); 1')  # as the menu does, without its question
    until(lambda: call(page, VISIBLE, gone), 'The sentence about the kernel')
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
        lambda: call(page, VISIBLE, '.samtok-still img') and call(page, VISIBLE, '.samtok-still .samtok-gone'),
        'The still picture with its sentence',
    )
    return 'the still pictures stand in for the views'


def write_notebook(folder, work):
    "Write the notebook of the cells, and a setting that keeps a question off the pictures."
    import nbformat

    work.mkdir()
    news = Path(folder) / 'settings/@jupyterlab/apputils-extension'
    news.mkdir(parents=True)
    (news / 'notification.jupyterlab-settings').write_text('{"fetchNews": "false"}')
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    kernel = dict(name='python3', display_name='python3', language='python')
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
    nbformat.write(notebook, work / 'widgets.ipynb')


def open_notebook(page, url, api):
    "Open the notebook and run all of its cells."

    def idle():
        return {kernel['execution_state'] for kernel in json.load(urlopen(api('/api/kernels')))} == {'idle'}

    connection = f'{NOTEBOOK}?.context?.sessionContext?.session?.kernel?.connectionStatus'
    page.send('Page.enable')
    page.send('Page.navigate', url=url)
    until(
        lambda: page.js('!!window.jupyterapp') and count(page, '.jp-Notebook .jp-Cell'),
        'The notebook in JupyterLab',
        90,
    )
    until(lambda: page.js(f"{connection} == 'connected'"), 'The kernel', 60)
    page.js("jupyterapp.commands.execute('notebook:run-all-cells').then(() => 1)")
    page.js(MARK)
    until(lambda: count(page, '.samtok-live') == 4, 'All four widgets', 120)
    until(idle, 'The end of the cells', 60)


def run(browser, folder):
    "Try every widget -> how many parts passed."
    port, token = free_port(), secrets.token_hex(16)
    work = Path(folder) / 'work'
    write_notebook(folder, work)

    def api(path):
        return f'http://127.0.0.1:{port}{path}?token={token}'

    with jupyter(folder, port, token), chromium(browser, folder):
        until(lambda: urlopen(api('/api/status')).status == 200, 'The start of JupyterLab', 90)
        page = Page(folder)
        url = api('/doc/tree/widgets.ipynb') + '&reset'
        open_notebook(page, url, api)
        parts = dict(
            MaskPicker=lambda: pick(page),
            CodebookExplorer=lambda: explore(page),
            ReplyInspector=lambda: inspect(page),
            RunDashboard=lambda: follow(page, work),
            restart=lambda: restart(page),
            reopen=lambda: reopen(page, url, api),
        )
        for name, part in parts.items():
            page.js(MARK)
            print(f'pass  {name}: {part()}', flush=True)
    return len(parts)


def main():
    browser = os.environ.get('BROWSER_PATH') or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        print(
            'skipped: no Chromium or Chrome was found; install one, or name it with BROWSER_PATH=..., '
            'to try the widgets in a browser.'
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
