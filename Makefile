# Two commands do everything from a bare Python: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/digits

.PHONY: demo test test-slow lint docs loc clean

demo: .venv/installed
	$(BIN)/python train.py --config configs/digits.py --workdir $(RUN)
	$(BIN)/python sample.py --weights $(RUN) --labels 0,1,2,3,4,5,6,7,8,9 --num 100 \
	    --out $(RUN)/sheet.png --overwrite
	$(BIN)/python sample.py --weights $(RUN) --labels 0,1,2,3,4,5,6,7,8,9 --num 1000 \
	    --seed 1 --batch-size 250 --out $(RUN)/samples.npz --overwrite
	$(BIN)/python evaluate.py $(RUN)/samples.npz --network digits --overwrite
	@echo "the samples, one row a digit: $(RUN)/sheet.png"

test: lint docs
	$(BIN)/python -m pytest -n 2 --dist loadfile

# in pairs, as they wait for each other most of the time
SLOW := $(BIN)/python -m pytest --durations=25 -n 2 --dist worksteal
test-slow: .venv/slow
	$(SLOW) tests -m slow -o addopts="-q --ignore=tests/slow"
	$(SLOW) tests/slow -o addopts=-q

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

docs: .venv/docs
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "the site: build/docs/index.html"

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	    || { echo "$(PYTHON) is not Python 3.11 or 3.12: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

.venv/docs: requirements-docs.txt .venv/installed
	$(BIN)/python -m pip install -q -r requirements-docs.txt
	touch $@

.venv/slow: requirements-slow.txt .venv/dev
	$(BIN)/python -m pip install -q -r requirements-slow.txt
	# without torchvision, which only its command takes
	$(BIN)/python -m pip install -q --no-deps torch-fidelity==0.4.0
	touch $@

loc:
	@$(PYTHON) benchmarks/loc.py

clean:
	rm -rf .venv .cache runs
