# Three images, by --target: cpu (the last, so the default), gpu, and onnx, which has no torch. See docs/docker.md.

FROM python:3.12-slim-trixie AS base

# ---- what builds, and is not in an image ----

FROM base AS build
RUN pip install --no-cache-dir uv==0.13.9
# No bytecode could be written later. Files are copied: the cache is mounted, and a link to it would lead nowhere.
ENV VIRTUAL_ENV=/opt/venv UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never UV_CACHE_DIR=/cache
RUN uv venv --python /usr/local/bin/python3 /opt/venv
WORKDIR /src
COPY constraints.txt ./

FROM build AS package
COPY LICENSE README.md pyproject.toml setup.py ./
COPY accent_plugin accent_plugin
RUN --mount=type=cache,target=/cache \
    uv build --wheel --build-constraints constraints.txt --out-dir /dist && uv pip install --no-deps /dist/*.whl

# Apart from the package, so that a change of it leaves the layer of gigabytes as it is. setup.py reads README.md, whose
# text changes nothing here.
FROM build AS requirements
COPY setup.py ./
COPY accent_plugin/__init__.py accent_plugin/
RUN touch README.md

# PyTorch's builds for processors: the ordinary ones bring CUDA.
FROM requirements AS build-cpu
ENV UV_TORCH_BACKEND=cpu
RUN --mount=type=cache,target=/cache \
    uv pip install --constraints constraints.txt --requirements setup.py --extra serve

# For a driver that is too old for this CUDA: --build-arg UV_TORCH_BACKEND=cu126
FROM requirements AS build-gpu
ARG UV_TORCH_BACKEND
RUN --mount=type=cache,target=/cache \
    uv pip install --constraints constraints.txt --requirements setup.py --extra serve

# What an exported model needs, the server's packages as the wheel names them, and Matplotlib, whose colours the page has.
FROM package AS build-onnx
RUN --mount=type=cache,target=/cache \
    /opt/venv/bin/python -c "from importlib.metadata import requires; \
print(*(line.split(';')[0] for line in requires('accent_plugin') if line.endswith('extra == \"serve\"')), sep='\n')" \
    > serve.txt \
    && uv pip install --constraints constraints.txt --requirements serve.txt onnxruntime numpy scipy soundfile soxr tqdm \
    matplotlib

# ---- what runs ----

FROM base AS runtime
LABEL org.opencontainers.image.title="accent_plugin" org.opencontainers.image.licenses="Apache-2.0"
# As process 1 Python would not hear SIGTERM where it has no handler: tini hands it on.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 accent \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin accent
# Caches go to HOME, the only place that is written to. USER has a name for `--user` with a number that has none. Nothing
# asks the Hub, and ONNX Runtime, which reports its use by default, does not. Threads that wait by spinning slow down a
# machine that has other work to do.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    USER=accent \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    OMP_WAIT_POLICY=PASSIVE
USER 10001:10001
WORKDIR /workspace
EXPOSE 7860
# Not through a proxy that HTTP_PROXY may name.
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import *; \
build_opener(ProxyHandler({})).open('http://127.0.0.1:7860/api/health', timeout=8)"]
ENTRYPOINT ["tini", "--", "accent-plugin"]
CMD ["serve", "--model", "/model", "--host", "0.0.0.0", "--port", "7860"]

FROM runtime AS gpu
COPY --from=build-gpu /opt/venv /opt/venv
COPY --from=package /opt/venv/bin/accent-plugin /opt/venv/bin/
COPY --from=package /opt/venv/lib/python3.12/site-packages /opt/venv/lib/python3.12/site-packages

FROM runtime AS onnx
COPY --from=build-onnx /opt/venv /opt/venv

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
COPY --from=package /opt/venv/bin/accent-plugin /opt/venv/bin/
COPY --from=package /opt/venv/lib/python3.12/site-packages /opt/venv/lib/python3.12/site-packages
