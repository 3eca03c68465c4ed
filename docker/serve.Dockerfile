# A service on the CPU, from the wheel of this checkout. It was not built where it was written: there was no daemon.
#
#   uv build --wheel --out-dir dist
#   docker build -f docker/serve.Dockerfile -t patchlife-serve .
#   docker run --init --shm-size=512m -p 127.0.0.1:8000:8000 -v "$PWD/my-bundle:/model:ro" \
#     patchlife-serve /model --host 0.0.0.0
#
# --host 0.0.0.0 is inside the container; -p 127.0.0.1:8000:8000 keeps the port on this machine. There is no password.
FROM python:3.12-slim

RUN useradd --create-home patchlife
COPY dist/patchlife-*.whl /tmp/
# On Linux torch's usual wheels bring CUDA libraries. For a smaller image give the index of its CPU wheels:
#   --build-arg TORCH_OPTIONS="--index-url URL"
ARG TORCH_OPTIONS=""
RUN pip install --no-cache-dir $TORCH_OPTIONS torch torchvision \
    && wheel=$(ls /tmp/patchlife-*.whl) \
    && pip install --no-cache-dir "patchlife[ray,onnx,transformers,open_clip] @ file://$wheel" \
    && rm /tmp/patchlife-*.whl

USER patchlife
WORKDIR /home/patchlife
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["patchlife", "serve"]
CMD ["demo", "--host", "0.0.0.0"]
