-- When the index was begun, the latest version in it, and which records have
-- changed since a version; all, where that is of another index.
local idx, begun, since = KEYS[1], ARGV[1], tonumber(ARGV[2])
local kind = redis.call('TYPE', idx).ok
if kind ~= 'zset' and kind ~= 'none' then redis.call('DEL', idx) end
local top = redis.call('ZREVRANGE', idx, 0, 0, 'WITHSCORES')
local version = tonumber(top[2]) or 0
local first = redis.call('ZRANGEBYSCORE', idx, 0, 0, 'LIMIT', 0, 1)[1]
local epoch = first and string.match(first, '^e:(%d+)$')
if version > 0 and (version >= 9007199254740992 or not epoch) or version < 0 then
  redis.call('DEL', idx)
  version = 0
end
if version == 0 then epoch = '0' end
-- Versions that went back tell of a history that is lost, too.
if epoch ~= begun or version < since then since = 0 end
return { tonumber(epoch), version,
  redis.call('ZRANGEBYSCORE', idx, '(' .. string.format('%.0f', since), '+inf') }
