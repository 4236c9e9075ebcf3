import { readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { extname, join } from 'node:path';
import { gzipSync } from 'node:zlib';
import { defineConfig } from 'vite';

const BASE = '/graphiql/';
const OUT = new URL('../dist/graphiql/', import.meta.url).pathname;
const NOTICES = new URL('node_modules/monaco-editor/ThirdPartyNotices.txt', import.meta.url).pathname;
const LICENSES = 'licenses.md';

const CONTENT_TYPES = {
  '.css': 'text/css; charset=utf-8',
  '.js': 'text/javascript; charset=utf-8',
  '.md': 'text/plain; charset=utf-8',
  '.svg': 'image/svg+xml',
  '.ttf': 'font/ttf',
};
const GZIPPED = new Set(['.css', '.js', '.ttf']);

/** Keeps the big files gzipped only, and writes manifest.json: URL path -> {file, contentType, encoding}. */
function pack() {
  return {
    name: 'pack',
    closeBundle() {
      const licenses = readFileSync(join(OUT, LICENSES), 'utf8').trimEnd();
      const notices = readFileSync(NOTICES, 'utf8').replaceAll('\r\n', '\n').trimEnd();
      writeFileSync(join(OUT, LICENSES), `${licenses}\n\n## Notices of monaco-editor\n\n${notices}\n`);

      const manifest = {};
      for (const name of [...readdirSync(join(OUT, 'assets')).map((asset) => `assets/${asset}`), LICENSES].sort()) {
        const extension = extname(name);
        const contentType = CONTENT_TYPES[extension];
        if (contentType === undefined) {
          throw new Error(`${name}: no content type is known for ${extension}`);
        }
        const gzipped = GZIPPED.has(extension);
        const file = gzipped ? `${name}.gz` : name;
        if (gzipped) {
          writeFileSync(join(OUT, file), gzipSync(readFileSync(join(OUT, name)), { level: 9 }));
          rmSync(join(OUT, name));
        }
        manifest[BASE + name] = { file, contentType, encoding: gzipped ? 'gzip' : null };
      }
      writeFileSync(join(OUT, 'manifest.json'), `${JSON.stringify(manifest, null, 2)}\n`);
    },
  };
}

export default defineConfig({
  base: BASE,
  plugins: [pack()],
  build: {
    outDir: OUT,
    emptyOutDir: true,
    sourcemap: false,
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    chunkSizeWarningLimit: 4_000,
    reportCompressedSize: false,
    license: { fileName: LICENSES },
    rolldownOptions: {
      onLog(level, log, handler) {
        // React's "use client", in dozens of packages: it means nothing here.
        if (log.code !== 'MODULE_LEVEL_DIRECTIVE') {
          handler(level, log);
        }
      },
    },
  },
  worker: { format: 'es' },
});
