"""ToonFaces: procedural anime faces with known truth.

`identity` says who a character is, `look` how one picture shows it, `style` how it is drawn. `render` puts
one character into a picture and `scene` several; both draw from back to front with `background`, `hair`,
`body`, `head`, `eyes`, `accessories`, `fringe` and `front_hair`, `occluders` and `hats`, on a `canvas`, with
the curves and the turning head of `geometry`. `split` plans a data set, `dataset` writes it.
"""
