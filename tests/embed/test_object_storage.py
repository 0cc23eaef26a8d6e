"""A store, and images, in a bucket: S3 as moto plays it on the loopback."""

import pickle
import threading

import numpy as np
import pytest

import tiny
from tinyvit import CheckpointError, EmbeddingStore, embed_images
from tinyvit.embed.commits import keep_up

BUCKET = "s3://photos"


@pytest.fixture(scope="module")
def server():
    """An empty S3 with one bucket, known by the environment; gives its client."""
    import boto3
    from moto.server import ThreadedMotoServer

    patch = pytest.MonkeyPatch()
    moto = ThreadedMotoServer("127.0.0.1", 0)
    moto.start()
    host, port = moto.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT": f"http://{host}:{port}",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        patch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="photos")
    yield client
    moto.stop()
    patch.undo()


pytestmark = [
    pytest.mark.slow,  # 10 s
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of boto3 and moto
]


def test_a_store_and_its_images_in_a_bucket(server, photos, engine):
    for path in photos.rglob("*.png"):
        name = path.relative_to(photos).as_posix()
        server.upload_file(str(path), "photos", f"in/{name}")
    server.put_object(Bucket="photos", Key="in/empty.jpg", Body=b"")
    url = f"{BUCKET}/photos.lance"
    with pytest.raises(CheckpointError, match="there is no embedding store at s3://photos"):
        EmbeddingStore.open(url)
    report = embed_images(f"{BUCKET}/in", url, engine)
    assert (report.stored, len(report.failed)) == (6, 1)
    store = pickle.loads(pickle.dumps(EmbeddingStore.open(url)))
    assert sorted(store) == sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    for name in store:
        (wanted,) = engine.stream(photos / name)
        assert np.array_equal(store[name].features, wanted.features.astype(np.float16))
    assert embed_images(f"{BUCKET}/in", url).kept == 6  # by the encoder in the bucket
    tiny.write_image(photos / "new.png", 20, 20, seed=9)
    assert embed_images(photos, url, engine).stored == 1  # local images into the bucket
    keep_up(store)
    assert store["new.png"].original_size == (20, 20)
    with pytest.raises(ValueError, match="there is nothing at 's3://photos/none'"):
        embed_images(f"{BUCKET}/none", url, engine)


def test_writers_of_one_store_in_a_bucket(server, photos, engine):
    url, faults = f"{BUCKET}/two.lance", []
    EmbeddingStore.create(url, engine)

    def write():
        try:
            embed_images(photos, url, engine)
        except BaseException as err:
            faults.append(err)
            raise

    writers = [threading.Thread(target=write) for _ in range(2)]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    assert not faults
    store = EmbeddingStore.open(url)
    assert store.dataset.count_rows() == len(store) == 6
