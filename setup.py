"Everything about the package is in settings.ini; a wheel also carries the small data files that the package reads."

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

DATA = (
    'params/*.json',
    'mixtures/*.json',
    'toy/**/*',
    'shapeworld/*',
)  # of data/, found at run time by samtok.runs.data_file

here = Path(__file__).resolve().parent
config = ConfigParser(delimiters=['='])
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lib = cfg['lib_name']
statuses = [
    '1 - Planning',
    '2 - Pre-Alpha',
    '3 - Alpha',
    '4 - Beta',
    '5 - Production/Stable',
    '6 - Mature',
    '7 - Inactive',
]
licenses = dict(apache2='Apache-2.0', mit='MIT')


class BuildWithData(build_py):
    "Copy data/ into the built package as samtok/_data; an editable install reads data/ itself."

    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False):
            return
        for file in sorted({f for pattern in DATA for f in (here / 'data').glob(pattern) if f.is_file()}):
            target = Path(self.build_lib, lib, '_data', file.relative_to(here / 'data'))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


setup(
    name=lib,
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here / 'README.md').read_text(encoding='utf-8')
    if (here / 'README.md').exists()
    else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license=licenses[cfg['license']],
    keywords=cfg['keywords'],
    classifiers=[
        f'Development Status :: {statuses[int(cfg["status"]) - 1]}',
        f'Intended Audience :: {cfg["audience"]}',
        f'Natural Language :: {cfg["language"]}',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ]
    + [f'Programming Language :: Python :: 3.{minor}' for minor in range(int(cfg['min_python'].split('.')[1]), 14)],
    python_requires=f'>={cfg["min_python"]}',
    packages=find_packages(include=[lib, f'{lib}.*']),
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{lib}={lib}._modidx:d']},
    cmdclass={'build_py': BuildWithData},
    zip_safe=False,
)
