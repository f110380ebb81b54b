"""Recognise, enrol, annotate, reconstruct and verify anime faces in the browser.

    pip install -r requirements-demo.txt
    python -m visualize.demo                                     # the small weights that ship with it, on any machine
    python -m visualize.demo --ckpt RUN/checkpoint-best.pth --mae RUN/checkpoint-last.pth --enrol CHARACTERS

It answers to this machine alone unless --host says otherwise. The gallery and the annotations stay on disk.
"""

from models_finders import KINDS, WHOLE
from util.run.args import Parser, count, number, positive
from util.run.errors import cli
from visualize.demo.app import serve
from visualize.demo.models import Settings
from visualize.demo.pictures import Limits


def parse_args(argv: list[str] | None):
    """The flags."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    own = "default: the small ToonFaces-trained weights that ship with the demo"
    add("--ckpt", metavar="W", help=f"recogniser: checkpoint of a transfer run, or any encoder; {own}")
    add("--mae", metavar="W", help=f"masked autoencoder with its decoder, for reconstruction; {own}")
    add(
        "--finder", metavar="SPEC", help=f"{', '.join(KINDS[:3])}; + unites several; {WHOLE}: pictures are faces; {own}"
    )
    add("--gallery", metavar="DIR", default="runs/gallery", help="folder of the enrolled characters")
    add("--enrol", metavar="DIR", help="a folder of pictures for each character: those not yet in the gallery join it")
    add("--annotations", metavar="DIR", default="runs/annotations", help="prepared folder that annotations go to")
    add("--host", default="127.0.0.1", help="address to answer at; 0.0.0.0: every machine of the network")
    add("--port", type=number(int, 1, 65535), default=7860, help="TCP port, 1 to 65535")
    add("--max_mb", type=positive, default=20.0, help="largest file that may be uploaded, megabytes")
    add("--max_pixels", type=count, default=40_000_000, help="largest picture that is unpacked, pixels")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    """Serve until interrupted."""
    args = parse_args(argv)
    settings = Settings(
        ckpt=args.ckpt, mae=args.mae, finder=args.finder, gallery=args.gallery, annotations=args.annotations,
        device=args.device, limits=Limits(args.max_mb, args.max_pixels), enrol=args.enrol,
    )  # fmt: skip
    serve(settings, args.host, args.port)


if __name__ == "__main__":
    main()
