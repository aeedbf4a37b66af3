# An image for one labeller that needs an environment of its own: MiniCPM-Llama3-V 2.5, whose remote code was reported to
# work with transformers around 4.40 only. Family `minicpmv` runs in it (`rlaifv/models/remote.py`); docs/models.md says how.
# The image itself was not built by this project; the family was run with transformers 4.40.2, NumPy 1.26 and PyArrow 20.
#   docker build -f images/labeller.Dockerfile -t rlaifv-labeller .
ARG BASE_IMAGE=docker.io/library/python:3.11-slim
FROM ${BASE_IMAGE}
ARG TRANSFORMERS=4.40.2
ARG TORCH=2.2.2
ARG TORCHVISION=0.17.2
RUN command -v tini >/dev/null \
 || (apt-get update && apt-get install -y --no-install-recommends tini && rm -rf /var/lib/apt/lists/*)
COPY pyproject.toml README.md LICENSE /src/
COPY rlaifv /src/rlaifv
COPY jobs /src/jobs
COPY controller /src/controller
RUN python3 -m venv /opt/rlaifv \
 && /opt/rlaifv/bin/pip install --quiet --no-cache-dir "torch==${TORCH}" "torchvision==${TORCHVISION}" \
      "transformers==${TRANSFORMERS}" "huggingface_hub<0.24" timm sentencepiece "numpy<2" "pyarrow==20.0.0" \
      pillow "pydantic>=2.10" pyyaml tqdm boto3 \
 && /opt/rlaifv/bin/pip install --quiet --no-cache-dir --no-deps /src
ENV PATH=/opt/rlaifv/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
RUN python -c "import jobs.verify, rlaifv.models.remote, rlaifv.serve, torchvision"
ENTRYPOINT ["tini", "--", "python", "-m"]
