"""Rules of form that ruff cannot see, one function each; `.ci/check.py form` runs them.

Each takes nothing or an exported module and yields problems, each a sentence that says where and what.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIB, COLUMNS = ROOT / 'samtok', 120


def modules():
    "The exported modules, without nbdev's index."
    return [f for f in sorted(LIB.rglob('*.py')) if not f.stem.startswith('_')]


def ruff():
    "Notebooks, setup.py and .ci are formatted, and exported modules name what they use."
    commands = (
        ('format', '--check', '--quiet', '.'),
        ('check', '--output-format', 'concise', '.'),
        # a lesson may import what a cell of the module forgot: only the module itself shows it
        (
            'check',
            '--isolated',
            '--select',
            'F401,F821',
            '--exclude',
            '_modidx.py',
            '--output-format',
            'concise',
            'samtok',
        ),
    )
    for command in commands:
        done = subprocess.run([sys.executable, '-m', 'ruff', *command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            yield f'ruff {" ".join(command)}:\n' + '\n'.join((done.stdout + done.stderr).strip().splitlines()[:30])


def long_lines(file, lines):
    "Lines over 120 columns; nbdev's own __all__ is its business."
    inside = False
    for i, line in enumerate(lines, 1):
        inside = inside or line.startswith('__all__ = ')
        if len(line) > COLUMNS and not inside:
            yield f'{file}:{i} has {len(line)} columns.'
        inside = inside and not line.endswith(']')


def assigned_methods(file, tree):
    "Functions that are assigned onto a class: help() and stack traces would call them by another name."
    classes = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    for node in tree.body:
        for target in node.targets if isinstance(node, ast.Assign) else ():
            for t in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id in classes:
                    yield f'{file}:{node.lineno} assigns {t.value.id}.{t.attr}: write the method into the class.'


def is_ours(node):
    "An import from our package, relative or by its name: nbdev leaves imports of several lines absolute."
    return isinstance(node, ast.ImportFrom) and bool(node.level or (node.module or '').split('.')[0] == 'samtok')


def many_bases(file, tree):
    "Classes with more than two bases of our own."
    ours = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    for node in ast.walk(tree):
        if is_ours(node):
            ours |= {a.asname or a.name for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = [b.id for b in node.bases if isinstance(b, ast.Name) and b.id in ours]
            if len(bases) > 2:
                yield f'{file}:{node.lineno} {node.name} has the bases {", ".join(bases)}: at most two of our own.'


def private_imports(file, tree):
    "Private names that are imported from another module."
    for node in ast.walk(tree):
        if is_ours(node):
            for a in node.names:
                if a.name.startswith('_'):
                    yield f'{file}:{node.lineno} imports {a.name}: make it public, or move it down a floor.'


def undocumented(file, tree, lines):
    "Arguments of public functions and methods without a type, or without a line and a comment of their own."
    for where, node in public_functions(tree):
        arguments = [a for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs] if a.arg != 'self']
        arguments = [a for a in arguments if a.arg != 'cls']
        rows = [a.lineno for a in arguments]
        for a in arguments:
            name = f'{file}:{a.lineno} {where}({a.arg})'
            if a.annotation is None:
                yield f'{name} has no type.'
            elif rows.count(a.lineno) > 1 or a.lineno == node.lineno:
                yield f'{name} shares its line: one argument a line.'
            elif not re.search(r'#\s*\S', lines[(a.end_lineno or a.lineno) - 1]) and not comment_near(a, lines):
                yield f'{name} has no comment.'


def comment_near(argument, lines):
    "A comment behind the end of an argument whose default takes several lines."
    for line in lines[argument.lineno - 1 : argument.lineno + 12]:
        if re.search(r'[,)\]}]\s*#\s*\S', line):
            return True
        if line.rstrip().endswith(','):
            return False
    return False


def public_functions(tree):
    "Public functions and the public methods of public classes -> (name, node)."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            for n in node.body:
                if not isinstance(n, ast.FunctionDef):
                    continue
                hook = n.name.startswith('on_')  # of a trainer's callback: the trainer's arguments
                setter = any(isinstance(d, ast.Attribute) for d in n.decorator_list)
                if (n.name == '__init__' or not n.name.startswith('_')) and not hook and not setter:
                    yield f'{node.name}.{n.name}', n


def form():
    "Formatted notebooks; whole classes; one commented argument a line; no private imports; no long lines."
    problems = list(ruff())
    for path in modules():
        file = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding='utf-8')
        lines, tree = text.splitlines(), ast.parse(text)
        problems += long_lines(file, lines)
        for rule in (assigned_methods, many_bases, private_imports):
            problems += rule(file, tree)
        problems += undocumented(file, tree, lines)
    return problems
