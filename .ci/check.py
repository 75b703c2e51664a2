#!/usr/bin/env python
"""Checks of the repository, one function each; `make test` runs them all.

    .ci/check.py all                 every check, then every notebook; the last line counts both
    .ci/check.py lint export ...     only these checks: pip form settings export clean lint imports sidebar readme fuzz
    .ci/check.py tests [NOTEBOOK..]  run notebooks as tests, two at a time
    .ci/check.py readme --write      make README.md from nbs/index.ipynb
    .ci/check.py execute [NOTEBOOK..] execute notebooks in place, two at a time
    .ci/check.py docs                render the site into _docs

A check returns a list of problems, each a sentence that says where and what. The source is the notebooks, so every
check reads files and none of them changes any.
"""

import ast
import base64
import difflib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from functools import cache
from pathlib import Path

from form import form

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB, FLOORS = ROOT / 'nbs', ROOT / 'samtok', json.loads((ROOT / '.ci/floors.json').read_text())
RUN_NOTEBOOKS = (  # these have one cell tagged `parameters`
    r'(02a_|02b_|02c_|02d_|04_|06_|08_|08a_|09_|12_|toy/04_|toy/06_|tutorials/quickstart|tutorials/your_own_data'
    r'|paper/tokenizer_ablation|paper/tokenizer_cost|paper/scale)'
)
PAGES = r'(toy/06_)'  # numbered notebooks without a module: pages
MODULES = {'toy/04_toy_sft': 'toy.train', 'toy/05_toy_tasks': 'toy.tasks'}  # where the name of the file says another
CELLS, MAX_KB, PARAMETERS = range(25, 81), 500, 30
RUN_TIME = r'[Rr]uns in (seconds|under a minute|under two minutes) on two CPU cores'
TOP = 99  # the floor of the toy
SLOW, TIMEOUT, WORKERS = 90, 900, 2  # seconds, seconds, notebooks at a time
ABSOLUTE = r'(?<![\w.:/<])/(?:home|root|Users|work|tmp|mnt|opt|var|content|data)/[\w.]|\b[A-Z]:\\\\?\w'

# ---------------------------------------------------------------- notebooks


def notebooks():
    "All notebooks, in the order of their file names, tutorials and others after the numbered ones."
    found = [f for f in NBS.rglob('*.ipynb') if not any(p.startswith(('.', '_')) for p in f.relative_to(NBS).parts)]
    return sorted(found, key=lambda f: (len(f.relative_to(NBS).parts), f.stem == 'index', f.as_posix()))


@cache
def read(file):
    return json.loads(file.read_text(encoding='utf-8'))


def name(file):
    return file.relative_to(NBS).as_posix()


def is_source(file):
    "Is it a numbered notebook, of the product or of the toy?"
    return re.match(r'(toy/)?\d\d', name(file)) is not None and not re.match(PAGES, name(file))


def text(cell):
    return ''.join(cell['source'])


def directives(cell):
    return re.findall(r'^#\| ?(\S.*?)\s*$', text(cell), re.M)  # two blanks after the bar continue a folded alt text


def code(cell):
    return '\n'.join(l for l in text(cell).splitlines() if not l.lstrip().startswith(('#|', '%', '!')))


def exported(cell):
    return any(re.match(r'exports?i?\b', d) for d in directives(cell))


def parse(cell):
    try:
        return ast.parse(code(cell)).body
    except SyntaxError:
        return []


def is_import(node):
    return isinstance(node, (ast.Import, ast.ImportFrom))


def output_text(cell):
    for o in cell.get('outputs', []):
        for value in [o.get('text', '')] + [v for k, v in o.get('data', {}).items() if k.startswith('text')]:
            yield ''.join(value)


def has_image(cell):
    return any(k.startswith('image/') for o in cell.get('outputs', []) for k in o.get('data', {}))


# ---------------------------------------------------------------- lint


def lint():
    "The form of the notebooks; CONTRIBUTING.md has the list."
    return [f'{name(f)}: {p}' for f in notebooks() for p in lint_notebook(f)]


def lint_notebook(file):
    nb = read(file)
    cells = nb['cells']
    codes = [c for c in cells if c['cell_type'] == 'code']
    if file.stat().st_size > MAX_KB * 1000:
        yield f'{file.stat().st_size // 1000} KB, at most {MAX_KB} are allowed: make its figures smaller.'
    if 'widgets' in nb['metadata']:
        yield 'holds widget state.'
    tagged = sum('parameters' in c['metadata'].get('tags', []) for c in cells)
    runs = bool(re.match(RUN_NOTEBOOKS, name(file)))
    if tagged != 1 if runs else tagged > (not is_source(file)):
        yield f'{tagged} cells are tagged `parameters`, {int(runs)} should be.'
    below = next((i + 1 for i, c in enumerate(codes) if 'parameters' in c['metadata'].get('tags', [])), 0)
    if runs and not re.search(
        r'^check_names\(globals\(\)(, .*)?\)$', '\n'.join(text(c) for c in codes[below : below + 2]), re.M
    ):
        yield 'does not stop at a parameter that it does not have: check_names(globals()) belongs below the parameters.'
    if runs and (n := parameter_lines(codes)) > PARAMETERS:
        yield f'{n} parameters, at most {PARAMETERS} are taken in at one look: leave rare ones to the parameter files.'
    if runs and (unread := unread_parameters(file, cells)):
        yield (
            f'papermill cannot read the line of {", ".join(unread)}, so that its help page leaves it out: '
            'no quotes with brackets, = or ; in the comment.'
        )
    for i, cell in enumerate(cells):
        yield from (f'cell {i}: {p}' for p in lint_cell(cell, file))
    if not any(re.search(RUN_TIME, text(c)) for c in cells[:3] if c['cell_type'] == 'markdown'):
        yield 'does not say near its top how long it runs, for example *Runs in seconds on two CPU cores.*'
    if is_source(file):
        yield from lint_source(file, cells, codes)


def parameter_lines(codes):
    "Number of parameters in the cell that papermill replaces."
    tagged = [c for c in codes if 'parameters' in c['metadata'].get('tags', [])]
    return sum(isinstance(node, ast.AnnAssign) for c in tagged for node in parse(c))


def unread_parameters(file, cells):  # -> names in the parameters cell that papermill does not find
    from papermill.inspection import inspect_notebook

    logging.getLogger('papermill').setLevel(logging.ERROR)
    named = [
        n.target.id
        for c in cells
        if 'parameters' in c['metadata'].get('tags', [])
        for n in parse(c)
        if isinstance(n, ast.AnnAssign)
    ]
    return sorted(set(named) - set(inspect_notebook(str(file))))


def lint_cell(cell, file):
    source = text(cell)
    for what in [source, *output_text(cell)]:
        if found := re.search(ABSOLUTE, what):
            yield f'names an absolute path ({found[0]}...).'
        if found := re.search(r'<[^<>\n]* at 0x[0-9a-f]{6,}>', what):
            yield f'shows an object id ({found[0]}).'
    yield from lint_markdown(source, file) if cell['cell_type'] == 'markdown' else lint_code(cell, source, file)


def lint_markdown(source, file):
    for alt, link in re.findall(r'(!?\[[^\]]*\])\(([^)\s]+)\)', source):
        if alt == '![]':
            yield f'the picture {link} has no alt text.'
        if re.match(r'\w+:|#', link) or not link:
            continue
        if not (file.parent / link.split('#')[0]).exists():
            yield f'the link to {link} leads nowhere.'


def lint_code(cell, source, file):
    body = parse(cell)
    for up, target in re.findall(r'(?<![\w/.])((?:\.\./)+)([\w-][\w.-]*)', source):
        if target != 'runs' and not (ROOT / target).exists() and not (file.parent / up / target).exists():
            yield f'points outside the repository ({up}{target}).'
    if re.search(r'^\s*(!|%)\s*(pip|conda|cd)\b', source, re.M):
        yield 'installs packages or changes the folder.'
    if re.search(r'\bnbdev_export\s*\(', source):
        yield 'exports from inside a notebook.'
    if cell.get('execution_count'):
        yield 'has an execution count: run nbdev_clean.'
    if any(o.get('output_type') == 'error' for o in cell.get('outputs', [])):
        yield 'shows an error output.'
    if any(map(noise, cell.get('outputs', []))):
        yield 'shows warnings or a progress bar: `.ci/check.py execute` takes them out.'
    if any(map(is_import, body)) and not all(map(is_import, body)):
        yield 'mixes imports with other code: the docs would run all of it.'
    if any(isinstance(n, ast.ImportFrom) and n.names[0].name == '*' and exported(cell) for n in body):
        yield 'exports a star import.'
    if has_image(cell) and not fig_alt(cell):
        yield 'shows a picture without `#| fig-alt:`.'


def lint_source(file, cells, codes):
    if len(cells) not in CELLS:
        yield f'{len(cells)} cells, {CELLS[0]} to {CELLS[-1]} are allowed: merge two, or split the notebook.'
    first = text(cells[0]).strip().splitlines()
    if (
        cells[0]['cell_type'] != 'markdown'
        or not first[0].startswith('# ')
        or not any(re.match(r'> .*\?\s*$', l) for l in first)
    ):
        yield 'the first cell is not a title (`# Name`) with a question (`> ...?`).'
    heads = {h.strip() for c in cells if c['cell_type'] == 'markdown' for h in re.findall(r'^##+ (.+)$', text(c), re.M)}
    for head in ('What we learned', 'Limits', 'Next'):
        if head not in heads:
            yield f'has no heading "{head}".'
    yield from lint_neighbours(file, cells)
    modules = [d.split()[1] for c in codes for d in directives(c) if d.startswith('default_exp ')]
    if any(map(exported, codes)) and modules != [module_of(file)]:
        yield f'exports to {modules}, its name says {module_of(file)}.'
    yield from lint_exports(codes)


def lint_neighbours(file, cells):
    "The second cell links the notebooks before and after in reading order, the section Next the one after."
    order = [f for f in notebooks() if re.match(r'(toy/)?\d\d', name(f)) and f.parent == file.parent]
    at = order.index(file)
    second = text(cells[1]) if len(cells) > 1 else ''
    end = '\n'.join(text(c) for c in cells if c['cell_type'] == 'markdown').rpartition('## Next')[2]
    for k, where, said in (
        (at - 1, 'its second cell', second),
        (at + 1, 'its second cell', second),
        (at + 1, 'the section Next', end),
    ):
        if 0 <= k < len(order) and f'({order[k].name}' not in said:
            side = 'before' if k < at else 'after'
            yield f'{where} does not link {order[k].name}, which is {side} it in reading order.'


def lint_exports(codes):
    "Every public name appears in one of the next two lesson cells."
    lessons = [i for i, c in enumerate(codes) if not exported(c) and any(not is_import(n) for n in parse(c))]
    for i, cell in enumerate(codes):
        if not exported(cell):
            continue
        near = '\n'.join(code(codes[j]) for j in [j for j in lessons if j > i][:2])
        for public in public_names(parse(cell)):
            if not re.search(rf'\b{public}\b', near):
                yield f'{public} is exported, but neither of the next two code cells uses it.'


def public_names(body):
    for node in body:
        targets = (
            [node.name]
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            else [t.id for t in node.targets if isinstance(t, ast.Name)]
            if isinstance(node, ast.Assign)
            else []
        )
        yield from (t for t in targets if not t.startswith('_'))


def module_of(file):
    "The module that a notebook exports, by its name: nbs/toy/01_scenes.ipynb gives toy.scenes."
    stem = name(file).removesuffix('.ipynb')
    return MODULES.get(stem) or '.'.join([*stem.split('/')[:-1], file.stem.split('_', 1)[1]])


# ---------------------------------------------------------------- package


def pip():
    "The installed packages fit together."
    done = subprocess.run(
        [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'check'], capture_output=True, text=True
    )
    return done.stdout.splitlines() + done.stderr.splitlines() if done.returncode else []


def settings():
    "pyproject.toml says to nbdev 3 what settings.ini says to nbdev 2."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini')
    lines = (ROOT / 'pyproject.toml').read_text().partition('[tool.nbdev]')[2].partition('\n[')[0].splitlines()
    pairs = [(k.strip(), json.loads(v)) for k, _, v in (l.partition('=') for l in lines if '=' in l)]
    return [
        f'pyproject.toml says {k} = {v}, settings.ini says {ini["DEFAULT"].get(k)}.'
        for k, v in pairs
        if str(v) != ini['DEFAULT'].get(k)
    ]


def export():
    "samtok/ is exactly what the notebooks export."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for f in notebooks():
            (target := copy / f.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(f, target)
        shutil.copyfile(ROOT / 'settings.ini', copy / 'settings.ini')
        (copy / 'samtok').mkdir()
        done = command('nbdev_export', cwd=copy)
        if done.returncode:
            return ['nbdev_export failed:\n' + done.stdout + done.stderr]
        return compare(copy / 'samtok', LIB, '*.py', 'run nbdev_export (edit the notebook, never the module)')


def compare(new, old, pattern, advice):
    names = {f.relative_to(d).as_posix() for d in (new, old) for f in d.rglob(pattern)}

    def lines(f):
        return f.read_text(encoding='utf-8').splitlines() if f.exists() else []

    diffs = {
        n: list(difflib.unified_diff(lines(old / n), lines(new / n), 'is', 'should be', lineterm='', n=0))
        for n in sorted(names)
    }
    return [f'{n} differs from what the notebooks give: {advice}.\n' + '\n'.join(d[:20]) for n, d in diffs.items() if d]


def clean():
    "The notebooks are as nbdev_clean leaves them."
    from execnb.nbio import nb2str, read_nb
    from nbdev.clean import _nbdev_clean

    os.chdir(ROOT)

    def dirty(f):
        nb = read_nb(f)
        _nbdev_clean(nb)
        return nb2str(nb).rstrip('\n') != f.read_text(encoding='utf-8').rstrip('\n')

    return [f'{name(f)} is not clean: run nbdev_clean.' for f in notebooks() if dirty(f)]


def imports():
    "Modules import only from lower floors, only what their floor may, and the lowest floor loads fast."
    problems, floors = [], FLOORS['modules']
    for file in sorted(LIB.rglob('*.py')):
        module = '.'.join(file.relative_to(LIB).with_suffix('').parts)
        if file.stem.startswith('_'):
            continue
        if module.startswith('toy.'):
            problems += check_imports(file, module, floors, TOP)
        elif module not in floors:
            problems.append(f'samtok.{module} has no floor: add it to .ci/floors.json.')
        else:
            problems += check_imports(file, module, floors, floors[module])
    return problems + list(
        slow_imports([''] + [f'.{m}' for m, floor in floors.items() if floor == 0 and (LIB / f'{m}.py').exists()])
    )


def imported(node, module):
    "Full names of what an import statement imports, relative ones resolved."
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    if not node.level:
        base = node.module
    else:
        package = ['samtok', *module.split('.')][: -node.level]
        base = '.'.join(package + ([node.module] if node.module else []))
    if base in ('samtok', 'samtok.toy'):  # modules by name
        return [f'{base}.{a.name}' for a in node.names]
    return [base]


def check_imports(file, module, floors, floor):
    "What a module imports must be of a lower floor; only the toy imports the toy."
    tree = ast.parse(file.read_text(encoding='utf-8'))
    allowed = {m for ms in FLOORS['third_party'][: floor + 1] for m in ms} | set(sys.stdlib_module_names)
    top = {id(n) for n in tree.body}
    for node in filter(is_import, ast.walk(tree)):
        where = f'{file.relative_to(ROOT)}:{node.lineno}'
        for full in imported(node, module):
            package, _, other = full.partition('.')
            if package == 'samtok' and other.split('.')[0] == 'toy':
                if floor < TOP:
                    yield f'{where} imports {full}: the product reaches the toy by name (samtok.runs.import_object).'
            elif package == 'samtok':
                if floors.get(other.split('.')[0], -1) >= floor:
                    yield f'{where} (floor {floor}) imports {full} of floor {floors[other.split(".")[0]]}.'
            elif package in ('fastcore', 'nbdev', 'execnb'):
                yield f'{where} imports {package}, which only developers have.'
            elif id(node) in top and package not in allowed and floor < TOP:
                yield f'{where} imports {package} at the top; floor {floor} may do so only inside functions.'


def slow_imports(modules, repeats=5):
    "Imports that take too much time of a core; what else the machine does is not counted."
    limit, best = FLOORS['import_seconds'], {}
    for module in modules:
        source = f'import time; t = time.process_time(); import samtok{module}; print(time.process_time() - t)'
        for _ in range(repeats):
            done = subprocess.run([sys.executable, '-c', source], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                yield f'import samtok{module} fails: {done.stderr.splitlines()[-1]}'
                break
            best[module] = min(float(done.stdout), best.get(module, 9))
            if best[module] < limit:
                break
        if best.get(module, 0) >= limit:
            yield f'import samtok{module} takes {best[module]:.2f} s, at most {limit} s are allowed.'


# ---------------------------------------------------------------- docs


def sidebar():
    "The site lists every notebook, and only those that exist; its settings are where Quarto and nbdev look for them."
    import yaml

    site, bar = (yaml.safe_load(f.read_text()) for f in (ROOT / '_quarto.yml', NBS / 'sidebar.yml'))

    def pages(items):
        return [p for i in items for p in (pages(i['contents']) if isinstance(i, dict) else [i])]

    listed, real = pages(bar['website']['sidebar']['contents']), [name(f) for f in notebooks()]
    problems = [f'nbs/sidebar.yml does not list {n}.' for n in real if n not in listed]
    problems += [f'nbs/sidebar.yml lists {n}, which does not exist.' for n in listed if n not in real]
    for pattern in (r'\d\d', r'toy/\d\d'):
        numbered = [n for n in listed if re.match(pattern, n)]
        if numbered != sorted(numbered):
            problems.append('The numbered notebooks are not in reading order in nbs/sidebar.yml.')
    if site['metadata-files'] != ['nbdev.yml', 'sidebar.yml']:
        problems.append('_quarto.yml must read nbdev.yml and sidebar.yml.')
    if (NBS / '_quarto.yml').resolve() != ROOT / '_quarto.yml':
        problems.append('nbs/_quarto.yml must be a link to ../_quarto.yml.')
    return problems


def readme(write=False):
    "README.md is what nbs/index.ipynb says, and lists every source notebook with its question."
    if not (NBS / 'index.ipynb').exists():
        return ['nbs/index.ipynb does not exist.']
    words, pictures = readme_text(read(NBS / 'index.ipynb'))
    files = {ROOT / 'README.md': words.encode(), **{NBS / 'images' / n: b for n, b in pictures.items()}}
    for file, content in files.items() if write else ():
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    problems = [
        f'{f.relative_to(ROOT)} is not what nbs/index.ipynb gives: run `.ci/check.py readme --write`.'
        for f, b in files.items()
        if not f.exists() or f.read_bytes() != b
    ]
    questions = {
        name(f): m[1]
        for f in notebooks()
        if is_source(f) and (m := re.search(r'^> (.+)$', text(read(f)['cells'][0]), re.M))
    }
    return problems + [
        f'The map in nbs/index.ipynb has not the question of {n}: execute the index again.'
        for n, q in questions.items()
        if q.strip() not in words
    ]


def readme_text(nb):
    "Turn the index notebook into GitHub's Markdown; returns the text and the pictures of its outputs."
    parts, pictures = ['<!-- Made from nbs/index.ipynb by .ci/check.py: edit the notebook. -->'], {}
    for cell in nb['cells']:
        if any(d in ('hide', 'include: false') for d in directives(cell)):
            continue
        if cell['cell_type'] == 'markdown':
            parts.append(relink(text(cell)))
            continue
        if cell['cell_type'] != 'code':
            continue
        if 'echo: false' not in directives(cell) and code(cell).strip():
            parts.append(f'```python\n{code(cell).strip()}\n```')
        alt = fig_alt(cell)
        for output in cell.get('outputs', []):
            parts += output_markdown(output, alt, pictures)
    return '\n\n'.join(p.strip('\n') for p in parts if p.strip()) + '\n', pictures


def fig_alt(cell):
    "The alt text of a cell's figure, on one line or folded over several."
    found = re.search(r'^#\| *fig-alt: *(.*(?:\n#\|  .*)*)', text(cell), re.M)
    words = re.sub(r'\n#\| *', ' ', found[1]) if found else ''
    return words.removeprefix('>').strip().strip('"')


def output_markdown(output, alt, pictures):
    data = output.get('data', {})
    if 'image/png' in data:
        pictures[file := f'index_{len(pictures)}.png'] = base64.b64decode(''.join(data['image/png']))
        return [f'![{alt}](nbs/images/{file})']
    if 'text/markdown' in data:
        return [relink(''.join(data['text/markdown']))]
    plain = ''.join(output.get('text', '') or data.get('text/plain', ''))
    return ['```text\n' + plain.strip('\n') + '\n```'] if plain.strip() else []


def relink(markdown):
    "Links of the notebook, seen from the top of the repository."
    markdown = markdown.replace('```{mermaid}', '```mermaid')

    def move(m):
        if re.match(r'\w+:|#|/', m[2]):
            return m[0]
        return f'{m[1]}({os.path.normpath("nbs/" + m[2])})'

    return re.sub(r'(!?\[[^\]]*\])\(([^)\s]+)\)', move, markdown)


def docs():
    "Render the site with Quarto; where it is missing, process the notebooks as for Quarto and write plain pages."
    readme(write=True)
    if problems := sidebar():
        return problems
    (ROOT / 'README.md').touch()  # newer than the index: nbdev leaves it alone
    if shutil.which('quarto'):
        return failed(command('nbdev_docs', '--n_workers', str(WORKERS), show=True))
    with tempfile.TemporaryDirectory() as stub:
        (quarto := Path(stub) / 'quarto').write_text('#!/bin/sh\n')
        quarto.chmod(0o755)
        if problems := failed(
            command('nbdev_proc_nbs', '--n_workers', str(WORKERS), env={'PATH': f'{stub}:{os.environ["PATH"]}'})
        ):
            return problems
    shutil.rmtree(ROOT / '_docs', ignore_errors=True)
    if (NBS / 'images').exists():
        shutil.copytree(NBS / 'images', ROOT / '_docs/images')
    for file in notebooks():
        plain_page(file)
    write_llms()
    print(
        'Quarto is not installed: plain pages are in _docs/. To render the site itself, install Quarto 1.4 or newer '
        '(quarto.org, "Get started", or conda install quarto from conda-forge) and run make docs again; '
        'the docs workflow does the same.'
    )
    return dead_links()


def plain_page(file):
    "Convert a processed notebook; links to notebooks become links to pages."
    import nbformat
    from nbconvert import HTMLExporter

    nb = nbformat.read(ROOT / '_proc' / file.relative_to(NBS), as_version=4)
    for cell in nb.cells:
        if cell.cell_type == 'raw':
            cell.update(nbformat.v4.new_markdown_cell(front_matter(cell.source)))
        elif cell.cell_type == 'code':
            if 'echo: false' in directives(cell):
                cell.metadata['transient'] = dict(remove_source=True)
            cell.source = '\n'.join(l for l in cell.source.splitlines() if not l.startswith('#|'))
            for data in (o.data for o in cell.outputs if 'data' in o and 'text/markdown' in o.data):
                data['text/markdown'] = plain(data['text/markdown'])
        else:
            cell.source = plain(cell.source)
    page, _ = HTMLExporter(
        anchor_link_text='', exclude_input_prompt=True, exclude_output_prompt=True
    ).from_notebook_node(nb)
    target = ROOT / '_docs' / file.relative_to(NBS).with_suffix('.html')
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        re.sub(r'(href="[^":#]*)\.ipynb((?:#[^"]*)?")', r'\1.html\2', page).replace(
            '</head>', '<style>pre { white-space: pre-wrap; }</style></head>'
        ),
        encoding='utf-8',
    )


def plain(markdown):
    "Markdown without what only Quarto reads: attributes of links stay out, a diagram is the text it is made of."
    markdown = re.sub(r'\{target="_blank"[^}]*\}', '', markdown).replace('```{mermaid}', '```text')
    return re.sub(r'^%%\|.*\n', '', markdown, flags=re.M)


def front_matter(source):
    "The title and the question of a processed notebook as Markdown."
    import yaml

    meta = next(yaml.safe_load_all(source)) or {}
    return f'# {meta.get("title", "")}\n\n> {meta.get("description", "")}'


def write_llms():
    "Write llms.txt: every page with the question it answers."
    rows = []
    for file in notebooks():
        lines = text(read(file)['cells'][0]).splitlines()
        question = next((l[1:].strip() for l in lines if l.startswith('>')), '')
        rows.append(f'- [{lines[0].lstrip("# ").strip()}]({file.relative_to(NBS).with_suffix(".html")}): {question}')
    (ROOT / '_docs/llms.txt').write_text('# SAMTok\n\n' + '\n'.join(rows) + '\n', encoding='utf-8')


def dead_links():
    "Files that a plain page names and that are not there."
    bad = []
    for page in sorted((ROOT / '_docs').rglob('*.html')):
        for link in set(re.findall(r'(?:href|src)="([^":#?]+)(?:#[^"]*)?"', page.read_text(encoding='utf-8'))):
            if not (page.parent / link).exists():
                bad.append(f'{page.relative_to(ROOT / "_docs")}: {link} is not there.')
    return bad


# ---------------------------------------------------------------- running notebooks


def command(*args, cwd=ROOT, env=None, timeout=None, show=False):
    "Run a command; at the timeout end it and whatever it started."
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    with subprocess.Popen(
        args,
        cwd=cwd,
        env={**os.environ, 'PATH': path, **(env or {})},
        text=True,
        start_new_session=True,
        stdout=None if show else subprocess.PIPE,
        stderr=None if show else subprocess.PIPE,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            err = (err or '') + f'\nEnded after {timeout} s: a cell did not come to an end.'
    return subprocess.CompletedProcess(args, process.returncode, out or '', err or '')


def failed(done):
    return [f'{" ".join(done.args[:3])} failed:\n{tail(done.stdout + done.stderr)}'] if done.returncode else []


def tail(words, n=60):
    return '\n'.join(words.strip().splitlines()[-n:])


def run_notebook(file):
    "Run a notebook as a test in a process of its own -> (file, seconds, problem or None)."
    start = time.time()
    env = dict(OMP_NUM_THREADS='1', CI='1', HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1')
    done = command('nbdev_test', '--path', str(file), '--n_workers', '0', env=env, timeout=TIMEOUT)
    good = done.returncode == 0 and 'Success' in done.stdout
    return (
        file,
        time.time() - start,
        None if good else tail(done.stdout + done.stderr) or 'nbdev_test found nothing to run.',
    )


def tests(files=None):
    "Run notebooks, the long ones first -> (number that passed, list of failed names)."
    files = (
        [Path(f).resolve() for f in files]
        if files
        else sorted(notebooks(), key=lambda f: (not re.match(RUN_NOTEBOOKS, name(f)), -f.stat().st_size))
    )
    bad = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for file, seconds, problem in pool.map(run_notebook, files):
            slow = f', SLOW: over {SLOW} s' if seconds > SLOW else ''
            print(
                f'{"FAIL" if problem else "pass"}  {name(file)}  ({seconds:.0f} s{slow})',
                *([problem] if problem else []),
                sep='\n',
                flush=True,
            )
            if problem:
                bad.append(name(file))
    return len(files) - len(bad), bad


def quiet(file):
    "Take warnings and progress bars out of an executed notebook."
    nb = json.loads(file.read_text(encoding='utf-8'))
    for c in nb['cells']:
        if c['cell_type'] == 'code':
            c['outputs'] = [o for o in c['outputs'] if not noise(o)]
    file.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def noise(output):
    return output.get('name') == 'stderr' or any('widget-view' in k for k in output.get('data', {}))


def execute_notebook(file):
    problems = failed(
        command(
            'jupyter',
            'nbconvert',
            '--to',
            'notebook',
            '--execute',
            '--inplace',
            '--ExecutePreprocessor.timeout=600',
            '--ExecutePreprocessor.store_widget_state=False',
            str(file),
            env={'HF_HUB_OFFLINE': '1', 'CI': '1', 'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1'},
        )
    )
    if not problems:
        quiet(file)
    return name(file), problems


def execute(files=None):
    "Execute notebooks in place, the index last because it lists the others."
    files, bad = [Path(f).resolve() for f in files or []] or notebooks(), []
    last = [f for f in files if f.stem == 'index']
    with ThreadPoolExecutor(WORKERS) as pool:
        for some in ([f for f in files if f not in last], last):
            for who, problems in pool.map(execute_notebook, some):
                print('failed' if problems else 'executed', who, flush=True)
                bad += problems
    return bad


def fuzz():
    "A short part of `make fuzz`: odd conversations, files and replies, in processes of their own."
    for name, args in (('conversations', ['1600']), ('files', ['400']), ('replies', ['--n', '20000'])):
        command = [sys.executable, f'.ci/fuzz_{name}.py', *args]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode:
            yield f'fuzz_{name}.py {" ".join(args)}: {tail(done.stdout + done.stderr)}'


CHECKS = dict(
    pip=pip,
    form=form,
    settings=settings,
    export=export,
    clean=clean,
    lint=lint,
    imports=imports,
    sidebar=sidebar,
    readme=readme,
    fuzz=fuzz,
)


def run_checks(names):
    "Print each check with its problems -> (number that passed, list of failed names)."
    bad = []
    for check in names:
        try:
            problems = list(CHECKS[check]())
        except Exception:
            problems = ['the check itself failed:\n' + tail(traceback.format_exc())]
        print(f'{"FAIL" if problems else "pass"}  {check}', *(f'  - {p}' for p in problems), sep='\n', flush=True)
        if problems:
            bad.append(check)
    return len(names) - len(bad), bad


def main(args):
    if not args or args[0] in ('-h', '--help'):
        print(__doc__)
        return 0
    if args == ['readme', '--write']:
        readme(write=True)
        return 0
    if args[0] in ('docs', 'execute'):
        problems = docs() if args[0] == 'docs' else execute(args[1:])
        print(*problems, sep='\n')
        return int(bool(problems))
    if unknown := set(args) - set(CHECKS) if args[0] not in ('all', 'tests') else None:
        print(f'There is no check {", ".join(sorted(unknown))}.\n{__doc__}')
        return 2
    passed, bad = 0, []
    for part in (
        ([run_checks, list(CHECKS)], [tests, None])
        if args[0] == 'all'
        else ([tests, args[1:]],)
        if args[0] == 'tests'
        else ([run_checks, args],)
    ):
        n, failures = part[0](part[1])
        passed, bad = passed + n, bad + failures
    if bad:
        print('Failed: ' + ', '.join(bad))
    print(f'{passed} passed, {len(bad)} failed')
    return int(bool(bad))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
