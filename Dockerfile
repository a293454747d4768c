# Reads films on the CPU: the base install, no torch. Not built here; README says how it is run.
FROM python:3.11-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
COPY constraints.txt /
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --only-binary=:all: --constraint /constraints.txt /wheels/*.whl \
    && install --directory --owner=10001 --group=10001 --mode=0700 /cache
# A number and not a name, so that a cluster can see that it is not root.
USER 10001:10001
# Only /tmp, the cache and the mounted output are written.
ENV CXRGAZE_CACHE=/cache HOME=/tmp PYTHONDONTWRITEBYTECODE=1
VOLUME /cache
WORKDIR /tmp
ENTRYPOINT ["cxrgaze-predict"]
CMD ["--help"]
